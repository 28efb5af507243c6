"""The interpreter of ONNX files compared with onnxruntime, the files that it refuses, and its own export."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.faces import OnnxModule

RNG = np.random.default_rng(0)


def weights(*shape: int, scale: float = 0.2) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    input_shape: list[int | str],
    opset: int = 17,
    extra_inputs: tuple[str, ...] = (),
) -> Path:
    """Write an ONNX file with input `x` and output `y`; `extra_inputs` are also listed as inputs of the graph."""
    names = ("x", *extra_inputs)
    shapes = {"x": input_shape, **{name: list(constants[name].shape) for name in extra_inputs}}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, path)
    return path


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.replace("-", "").split(" "), [output], name=f"{op}_{output}", **attributes)


def run_onnxruntime(path: Path, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def assert_matches(path: Path, x: Tensor) -> OnnxModule:
    module = OnnxModule(path)
    torch.testing.assert_close(module(x), run_onnxruntime(path, x), atol=1e-5, rtol=1e-5)
    return module


def norm(name: str, channels: int) -> dict[str, np.ndarray]:
    return {
        f"{name}.gamma": 1 + weights(channels),
        f"{name}.beta": weights(channels),
        f"{name}.mean": weights(channels),
        f"{name}.var": 1 + weights(channels) ** 2,
    }


def norm_inputs(name: str) -> str:
    return f"{name}.gamma {name}.beta {name}.mean {name}.var"


def iresnet(path: Path, batch: int | str = 1) -> Path:
    """Write a small random network with the blocks of iresnet, dots in names of weights, and 16 x 16 pixels."""
    constants = {
        "stem.w": weights(8, 3, 3, 3),
        "slope1": weights(8, 1, 1),
        "b1.w": weights(8, 8, 3, 3),
        "b1.b": weights(8),
        "down.w": weights(8, 8, 1, 1),
        "fc.w": weights(6, 8 * 8 * 8),
        "fc.b": weights(6),
        **norm("bn0", 8),
        **norm("bn1", 8),
        **norm("bn2", 8),
        **norm("bn3", 6),
    }
    nodes = [
        node("Conv", "x stem.w", "c0", pads=[1, 1, 1, 1], kernel_shape=[3, 3], auto_pad="NOTSET"),
        node("BatchNormalization", f"c0 {norm_inputs('bn0')}", "n0", epsilon=1e-3),
        node("PRelu", "n0 slope1", "p0"),
        node("BatchNormalization", f"p0 {norm_inputs('bn1')}", "n1"),
        node("Conv", "n1 b1.w b1.b", "c1", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", f"c1 {norm_inputs('bn2')}", "n2"),
        node("Conv", "p0 down.w", "c2", strides=[2, 2]),
        node("Add", "n2 c2", "a"),
        node("Dropout", "a", "d"),
        node("Flatten", "d", "f"),
        node("Gemm", "f fc.w fc.b", "g", transB=1),
        node("BatchNormalization", f"g {norm_inputs('bn3')}", "y"),
    ]
    return save(path, nodes, constants, [batch, 3, 16, 16], extra_inputs=("stem.w", "fc.b"))


def test_iresnet_blocks_match_onnxruntime_at_any_batch(tmp_path: Path) -> None:
    path = iresnet(tmp_path / "iresnet.onnx", batch="n")
    x = torch.randn(3, 3, 16, 16)
    module = assert_matches(path, x)
    # Only the BatchNormalization after PRelu remains, because it follows no layer that it could be folded into.
    assert module.operations.count("BatchNormalization") == 1
    torch.testing.assert_close(module(x[1:2]), module(x)[1:2], atol=1e-5, rtol=0)


def test_gradient_reaches_the_input_and_no_weight(tmp_path: Path) -> None:
    module = OnnxModule(iresnet(tmp_path / "iresnet.onnx")).double()
    assert not list(module.parameters())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x, fast_mode=True)


def test_shared_convolution_is_not_folded(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c"),
        node("BatchNormalization", f"c {norm_inputs('bn')}", "n"),
        node("Sub", "n c", "y"),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"w": weights(4, 3, 1, 1), **norm("bn", 4)}, ["n", 3, 5, 5])
    assert "BatchNormalization" in assert_matches(path, torch.randn(2, 3, 5, 5)).operations


CASES: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "pools": (
        [
            node("MaxPool", "x", "a", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
            node("AveragePool", "a", "b", kernel_shape=[2, 2], strides=[1, 1], pads=[1, 1, 1, 1]),
            node("AveragePool", "b", "c", kernel_shape=[2, 2], pads=[1, 0, 0, 0], count_include_pad=1),
            node("GlobalAveragePool", "c", "y"),
        ],
        {},
    ),
    "arithmetic": (
        [
            node("Sub", "x mean", "a"),
            node("Div", "a std", "b"),
            node("Clip", "b low -", "c"),
            node("Sigmoid", "c", "d"),
            node("Mul", "c d", "e"),
            node("Relu", "e", "f"),
            node("LeakyRelu", "b", "g", alpha=0.3),
            node("Concat", "f g", "y", axis=1),
        ],
        {"mean": weights(3, 1, 1), "std": 2 + weights(3, 1, 1), "low": np.array(-0.5, np.float32)},
    ),
    "shapes": (
        [
            node("Transpose", "x", "a", perm=[0, 2, 3, 1]),
            node("Reshape", "a to", "b"),
            node("MatMul", "b w", "c"),
            node("Softmax", "c", "d", axis=1),
            node("Unsqueeze", "d one", "e"),
            node("Squeeze", "e one", "f"),
            node("ReduceMean", "f", "g", axes=[1], keepdims=0),
            node("Identity", "g", "y"),
        ],
        {"to": np.array([0, -1, 6]), "w": weights(6, 5), "one": np.array([1])},
    ),
    "integers truncate": (
        [
            node("Mul", "x ten", "a"),
            node("Cast", "a", "b", to=TensorProto.INT64),
            node("Div", "b three", "c"),
            node("Cast", "c", "d", to=TensorProto.FLOAT),
            node("Cast", "c", "e", to=TensorProto.BOOL),
            node("Cast", "e", "f", to=TensorProto.FLOAT),
            node("Add", "d f", "g"),
            node("Add", "g x", "y"),
        ],
        {"ten": np.array(10, np.float32), "three": np.array(3)},
    ),
    "slopes per pixel": ([node("PRelu", "x slope", "y")], {"slope": weights(3, 8, 8)}),
    "gemm": (
        [node("Flatten", "x", "f"), node("Gemm", "f w c", "y", alpha=0.5, beta=2.0)],
        {"w": weights(192, 4), "c": weights(1, 4)},
    ),
    "grouped convolution": (
        [node("Conv", "x w", "y", group=3, dilations=[2, 2], pads=[2, 1, 1, 2])],
        {"w": weights(6, 1, 3, 3)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_match_onnxruntime(tmp_path: Path, case: str) -> None:
    nodes, constants = CASES[case]
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    module = assert_matches(save(tmp_path / "m.onnx", nodes, constants, ["n", 3, 8, 8]), x.detach())
    with_graph = module(x)
    torch.testing.assert_close(with_graph, module(x.detach()), atol=1e-6, rtol=0)
    with_graph.sum().backward()


@pytest.mark.parametrize("axis, block_size, scales", [(1, 4, (6, 3)), (0, 0, (6,)), (1, 0, ())])
def test_quantised_weights_are_folded(tmp_path: Path, axis: int, block_size: int, scales: tuple[int, ...]) -> None:
    constants = {
        "q": RNG.integers(-127, 127, (6, 12), dtype=np.int8),
        "s": (0.01 + RNG.random(scales)).astype(np.float32),
        "z": RNG.integers(-5, 5, scales, dtype=np.int8) if scales else np.array(3, np.int8),
        "shape": np.array([6, 3, 2, 2]),
    }
    attributes = {"axis": axis, **({"block_size": block_size} if block_size else {})}
    nodes = [
        node("DequantizeLinear", "q s z", "w2d", **attributes),
        node("Reshape", "w2d shape", "w"),
        node("Conv", "x w", "y"),
    ]
    module = assert_matches(save(tmp_path / "m.onnx", nodes, constants, [1, 3, 4, 4], 21), torch.randn(1, 3, 4, 4))
    assert module.operations == ("Conv",)


def test_batch_that_is_written_into_a_reshape_is_freed(tmp_path: Path) -> None:
    nodes = [node("Reshape", "x to", "r"), node("MatMul", "r w", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"to": np.array([1, -1]), "w": weights(12, 2)}, [1, 3, 2, 2])
    x = torch.randn(3, 3, 2, 2)
    expected = torch.cat([run_onnxruntime(path, one[None]) for one in x])
    torch.testing.assert_close(OnnxModule(path)(x), expected, atol=1e-5, rtol=0)


def test_exports_with_a_free_batch(tmp_path: Path) -> None:
    module = OnnxModule(iresnet(tmp_path / "iresnet.onnx"))
    torch.onnx.export(
        module,
        (torch.zeros(2, 3, 16, 16),),
        tmp_path / "again.onnx",
        input_names=["x"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        dynamo=True,
        verbose=False,
    )
    x = torch.randn(5, 3, 16, 16)
    # Outputs reach 15, where the rounding of fp32 is 1e-6, so the tolerance also needs a relative part.
    torch.testing.assert_close(run_onnxruntime(tmp_path / "again.onnx", x), module(x), atol=1e-5, rtol=2e-6)


def test_graphs_of_equal_weights_are_told_apart(tmp_path: Path) -> None:
    """Give different `repr` strings, from which the keys of engines are computed."""
    constants = {"w": weights(4, 3, 1, 1), "half": np.array([1, 1, 2, 2], np.float32), "shape": np.array([0, 4, -1])}

    def described(slope: float = 0.1, folder: str = "a", **others: np.ndarray) -> str:
        nodes = [
            node("Conv", "x w", "c"),
            node("LeakyRelu", "c", "l", alpha=slope),
            node("Resize", "l - half", "r", mode="nearest"),
            node("Reshape", "r shape", "y"),
        ]
        (tmp_path / folder).mkdir(exist_ok=True)
        return repr(OnnxModule(save(tmp_path / folder / "m.onnx", nodes, {**constants, **others}, ["n", 3, 8, 8])))

    same = {described(), described(folder="b"), described(w=weights(4, 3, 1, 1))}
    assert len(same) == 1
    others = [
        described(slope=0.2),
        described(half=np.array([1, 1, 3, 3], np.float32)),
        described(shape=np.array([0, -1, 4])),
    ]
    assert len({*same, *others}) == 4


def test_unknown_operation_and_attribute_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Gelu", "x", "y")], {}, [1, 3], 20)
    with pytest.raises(ConfigError, match=r"Gelu.*'Gelu_y'.*m\.onnx"):
        OnnxModule(path)
    nodes = [node("Conv", "x w", "y", auto_pad="SAME_UPPER")]
    path = save(tmp_path / "m.onnx", nodes, {"w": weights(2, 3, 3, 3)}, [1, 3, 4, 4])
    with pytest.raises(ConfigError, match=r"Conv.*auto_pad.*'Conv_y'"):
        OnnxModule(path)


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such ONNX file"):
        OnnxModule(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ConfigError, match="not an ONNX model"):
        OnnxModule(tmp_path / "text.onnx")


def external(path: Path, location: str) -> Path:
    """Write a model with one weight in external data in the file `location`."""
    save(path, [node("MatMul", "x w", "y")], {"w": weights(4, 2)}, ["n", 4])
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(tensor.raw_data)))):
        tensor.external_data.add(key=key, value=value)
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_stays_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    data = weights(4, 2)
    (folder / "w.bin").write_bytes(data.tobytes())
    (tmp_path / "outside.bin").write_bytes(data.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")

    x = torch.randn(3, 4)
    module = OnnxModule(external(folder / "m.onnx", "w.bin"))
    torch.testing.assert_close(module(x), x @ torch.from_numpy(data))
    for location in ("../outside.bin", str(tmp_path / "outside.bin"), "link.bin", "", "."):
        with pytest.raises(ConfigError, match="outside its folder"):
            OnnxModule(external(folder / "m.onnx", location))
    with pytest.raises(ConfigError, match="external data"):
        OnnxModule(external(folder / "m.onnx", "absent.bin"))
