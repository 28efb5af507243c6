"""TensorRT-RTX: real builds on any machine, and parity on a GPU that it supports."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from small_model import assert_follows_the_trainer, assert_parity, network_of, small_stages
from torch import nn

from frostline.errors import EngineError
from frostline.export.exporter import ensure_verified, export_stage
from frostline.export.tracing.onnx import trace_onnx
from frostline.runtime.backends import get_backend
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.backends.tensorrt.runner import TensorRTRunner, layer_table
from frostline.runtime.device import device_name
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import Network, Stage, TensorSpec

trt = pytest.importorskip("tensorrt_rtx")
Source = Callable[..., Path]

TENSORRT, TENSORRT_RTX = get_backend("tensorrt"), get_backend("tensorrt-rtx")
BOTH = BuildOptions(compute_capabilities=("8.9", "12.0"))
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines with no NVIDIA driver")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
PRECISIONS = [FP32, FP16, BF16]
BUILDS = [
    *(("text_encoder", "text_encoder", dtype) for dtype in PRECISIONS),
    *(("denoiser", "denoiser", dtype) for dtype in PRECISIONS),
    *(("face_detector", name, dtype) for name in ("pnet", "rnet", "onet") for dtype in PRECISIONS),
    *(("face_embedder", "face_embedder", dtype) for dtype in PRECISIONS),
    # Tracing of these networks takes longest, and they are similar, so only some precisions are tested.
    ("vae_encoder", "first", FP32),
    ("vae_encoder", "first", FP16),
    ("vae_encoder", "next", BF16),
    ("vae_decoder", "first", BF16),
    ("vae_decoder", "next", FP32),
    ("vae_decoder", "next", FP16),
]


@pytest.mark.parametrize(("stage", "name", "dtype"), BUILDS)
def test_builds_every_stage_in_every_precision(
    stage: str, name: str, dtype: torch.dtype, onnx_source: Source, tmp_path: Path
) -> None:
    network = network_of(stage, name, dtype)
    assert TENSORRT_RTX.build(network, onnx_source(stage, name, dtype), tmp_path, BOTH) == f"{name}.plan"
    weights = sum(tensor.nbytes for tensor in network.module.parameters())
    assert (tmp_path / f"{name}.plan").stat().st_size > weights / 2


class Softmax(nn.Module):
    """A softmax and two normalisations, and an output that stays in its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.nn.functional.normalize(self.norm(x), dim=1).softmax(-1), x * 2


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_what_is_unsafe_in_half_precision_is_fp32_in_the_graph(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Softmax().to(dtype).eval()
    x = TensorSpec("x", (Dimension("rows", 1, 4, 16), 8), dtype)
    trace_onnx(Network("islands", module, (x,), ("y", "z")), tmp_path / "islands.onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "islands.onnx")).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    by_type = {node.op_type: types[node.input[0]] for node in graph.node}
    for sensitive in ("LayerNormalization", "ReduceL2", "Softmax"):
        assert by_type[sensitive] == onnx.TensorProto.FLOAT
    narrow = {FP16: onnx.TensorProto.FLOAT16, BF16: onnx.TensorProto.BFLOAT16}[dtype]
    assert by_type["Div"] == narrow
    assert [(output.name, output.type.tensor_type.elem_type) for output in graph.output] == [
        ("y", narrow),
        ("z", narrow),
    ]


def test_opset_23_builds_too(tmp_path: Path) -> None:
    """Build an attention operator that has no fused kernel for fp32 with dynamic shapes."""
    network = network_of("denoiser", "denoiser")
    trace_onnx(network, tmp_path / "denoiser.onnx", opset=23)
    assert "Attention" in {node.op_type for node in onnx.load(tmp_path / "denoiser.onnx").graph.node}
    TENSORRT_RTX.build(network, tmp_path / "denoiser.onnx", tmp_path, BOTH)


def one_node(operator: str, path: Path) -> Path:
    node = onnx.helper.make_node(operator, ["x"], ["y"], name="the_node", domain="" if operator == "Relu" else "own")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in "xy")
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("own", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=opsets)
    onnx.save(model, path)
    return path


@pytest.fixture
def relu() -> Network:
    x = TensorSpec("x", (Dimension("n", 1, 2, 8), 4))
    module = nn.Sequential(nn.ReLU())
    module.register_buffer("weight", torch.zeros(1))
    return Network("relu", module, (x,), ("y",))


def test_the_parser_says_what_it_cannot_read(relu: Network, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"tensorrt_rtx cannot parse model: NoSuchOperator the_node: .*plugin"):
        TENSORRT_RTX.build(relu, one_node("NoSuchOperator", tmp_path / "model.onnx"), tmp_path, BOTH)


def test_a_gpu_that_it_does_not_build_for_is_named(relu: Network, tmp_path: Path) -> None:
    source = one_node("Relu", tmp_path / "model.onnx")
    with pytest.raises(EngineError, match=r"does not build for sm_90, only for .*SM89"):
        TENSORRT_RTX.build(relu, source, tmp_path, BuildOptions(compute_capabilities=("9.0",)))
    with pytest.raises(EngineError, match=r"does not build for sm_90, only for .*SM89"):
        TENSORRT_RTX.check_target("sm_89+sm_90")
    TENSORRT_RTX.check_target("sm_89+sm_120")


def test_progress_is_told_and_an_exception_in_there_ends_the_build(relu: Network, tmp_path: Path) -> None:
    source, told = one_node("Relu", tmp_path / "model.onnx"), []
    TENSORRT_RTX.build(relu, source, tmp_path, replace(BOTH, progress=lambda *step: told.append(step)))
    assert all(0 < step <= steps for _, step, steps in told)
    assert "Building engine" in {phase for phase, _, _ in told}
    (tmp_path / "relu.plan").unlink()

    def interrupted(phase: str, step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TENSORRT_RTX.build(relu, source, tmp_path, replace(BOTH, progress=interrupted))
    assert not (tmp_path / "relu.plan").exists()


def test_targets() -> None:
    cpu = torch.device("cpu")
    assert TENSORRT_RTX.target(cpu, BOTH) == "sm_89+sm_120"
    assert TENSORRT_RTX.target(cpu, BuildOptions(compute_capabilities=("8.6", "8.6"))) == "sm_86"


@WITHOUT_GPU
def test_targets_where_there_is_no_gpu() -> None:
    cpu = torch.device("cpu")
    assert TENSORRT_RTX.target(cpu, BuildOptions()) == "sm_89+sm_120"
    with pytest.raises(EngineError, match=r"no NVIDIA GPU on this machine: name a compute capability, such as 8\.9"):
        TENSORRT_RTX.target(cpu, BuildOptions(compute_capabilities=("current",)))
    with pytest.raises(EngineError, match="it only builds for the GPU of this machine"):
        TENSORRT.target(cpu, BuildOptions())


def test_a_missing_module_names_the_extra() -> None:
    assert get_backend("tensorrt-rtx").unavailable() is None
    if (reason := get_backend("tensorrt").unavailable()) is not None:
        assert "pip install 'frostline[tensorrt]'" in reason


@pytest.fixture(scope="module")
def text_stage() -> Stage:
    return small_stages()["text_encoder"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path, text_stage: Stage) -> EngineStore:
    """Return a store with a TensorRT-RTX engine of the text encoder."""
    store = EngineStore(tmp_path_factory.mktemp("engines"))
    assert export_stage(text_stage, "tensorrt-rtx", store, options=BOTH).built
    return store


@WITHOUT_GPU
def test_without_a_driver_an_engine_is_kept_unverified(store: EngineStore, text_stage: Stage) -> None:
    exported = export_stage(text_stage, "tensorrt-rtx", store, options=BOTH)
    assert not exported.built
    assert exported.unverified == "no NVIDIA driver"
    manifest = exported.manifest
    assert not manifest.verified
    assert not manifest.parity
    assert not manifest.latency_ms
    assert (manifest.device, manifest.compute_capabilities) == ("sm_89+sm_120", ("8.9", "12.0"))
    assert manifest.opset == 20
    assert ensure_verified([text_stage], store) == []


@WITHOUT_GPU
def test_without_a_driver_no_plan_chooses_it(
    store: EngineStore, text_stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stages = {"text_encoder": text_stage}
    assert Runtime(stages, "auto", store.root).plan["text_encoder"].backend == "torch"
    with caplog.at_level(logging.WARNING):
        choice = Runtime(stages, "tensorrt-rtx", store.root).plan["text_encoder"]
    assert choice.backend == "torch"
    assert "built, not verified here: no NVIDIA driver" in choice.reason
    with pytest.raises(EngineError, match="not verified here: no NVIDIA driver"):
        Runtime(stages, "tensorrt-rtx", store.root, strict=True)


@WITHOUT_GPU
def test_without_a_driver_loading_says_so(store: EngineStore, text_stage: Stage) -> None:
    (record,) = store.find()
    networks = {network.name: network for network in text_stage.networks}
    refused = r"capability 8\.9, 12\.0\) is built, not verified here: no NVIDIA driver"
    with pytest.raises(EngineError, match=refused):
        TENSORRT_RTX.load(store.verify(record), networks, torch.device("cpu"))
    with pytest.raises(EngineError, match=refused):
        TENSORRT_RTX.layers(store.verify(record), torch.device("cpu"))


def test_a_build_is_the_plan_alone(store: EngineStore) -> None:
    """Do not inspect an engine when it is built, because that needs its memory again."""
    (record,) = store.find()
    assert {path.name for path in record.path.iterdir()} == {"manifest.json", "text_encoder.plan"}


def test_other_gpus_are_another_engine(store: EngineStore, text_stage: Stage) -> None:
    exported = export_stage(text_stage, "tensorrt-rtx", store, options=BuildOptions(compute_capabilities=("8.6",)))
    assert exported.built
    assert exported.manifest.device == "sm_86"
    assert len(store.find()) == 2
    store.remove(next(record for record in store.find() if record.id.key == exported.manifest.key))


def test_a_truncated_plan_is_refused(store: EngineStore) -> None:
    (record,) = store.find()
    plan = record.path / "text_encoder.plan"
    content = plan.read_bytes()
    plan.write_bytes(content[:-100])
    try:
        with pytest.raises(EngineError, match="bytes, but the manifest states"):
            store.verify(record)
    finally:
        plan.write_bytes(content)
    assert store.verify(record).read("text_encoder.plan") == content


def runs_here() -> bool:
    """Return whether there is a GPU that TensorRT-RTX supports."""
    if not torch.cuda.is_available():
        return False
    name = device_name(torch.device("cuda", torch.cuda.current_device()))
    return name.upper().replace("_", "") in trt.ComputeCapability.__members__


@pytest.mark.gpu
@pytest.mark.skipif(not runs_here(), reason="needs an NVIDIA GPU of one of TensorRT-RTX's targets")
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("stage", "name"), [("denoiser", "denoiser"), ("face_detector", "pnet")])
def test_parity_on_a_gpu(stage: str, name: str, dtype: torch.dtype, onnx_source: Source, tmp_path: Path) -> None:
    network, device = network_of(stage, name, dtype), torch.device("cuda")
    network.module.to(device)
    try:
        options = BuildOptions(compute_capabilities=("current",))
        plan = tmp_path / TENSORRT_RTX.build(network, onnx_source(stage, name, dtype), tmp_path, options)
        with torch.cuda.device(device):
            assert json.loads(layer_table(trt, plan.read_bytes(), name))["Layers"]
        runner = TensorRTRunner(trt, plan.read_bytes(), network, device)
        # The third call of a shape replays the graph that the second call captured.
        for size in ("opt", "min", "opt", "opt", "opt"):
            assert_parity(network, runner, network.samples(size), stage)
        if stage == "denoiser" and dtype == FP32:
            assert_follows_the_trainer(network, runner)
    finally:
        network.module.to("cpu")
