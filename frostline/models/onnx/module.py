"""A small ONNX interpreter in torch operations, with frozen weights and a gradient to its input.

It covers the operations of face embedders in the ArcFace format (SFace, iresnet, MobileFaceNet) and of face detectors
(YuNet, SCRFD). Everything that depends only on constants, including quantised weights, is computed once when the file
is loaded.
"""

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor
from torch import Tensor, nn

from frostline.errors import ConfigError

from .ops import OPERATIONS, Argument


@dataclass(frozen=True)
class _Step:
    """One node: an operation, its inputs and its output, and the values that no later node reads."""

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]
    release: tuple[str, ...] = ()


class OnnxGraph(nn.Module):
    """An ONNX graph with one input and one or more outputs as a frozen PyTorch module.

    Weights become float32 buffers, batch normalisation is folded into the preceding convolution or matrix product, and
    any batch size is supported, whatever the file was exported with. Graph inputs that are unused or
    that are names of weights are ignored.

    Args:
        path: the .onnx file. Its external data, if any, must be in the same folder.

    Attributes:
        operations: ONNX names of the operations in each forward pass, in order.
        output_names: names of the outputs in the file's order.

    Raises:
        ConfigError: the file is missing, malformed or unsafe, or uses unsupported features.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        graph = load_onnx(self.path).graph
        constants = {tensor.name: _to_torch(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
        self.output_names = tuple(value.name for value in graph.output)
        steps = self._fold_constants(_steps(graph), constants)
        used = {name for step in steps for name in step.inputs}
        inputs = [value for value in graph.input if value.name in used and value.name not in constants]
        self._input = self._only("input", [value.name for value in inputs])
        dimensions = inputs[0].type.tensor_type.shape.dim
        if dimensions and dimensions[0].dim_value == 1:
            _free_batch(steps, constants)
        steps = _fold_batch_norms(steps, constants, self.output_names)
        self._steps = _with_releases(steps, self.output_names)
        self.operations = tuple(step.op for step in steps)

        self._arguments: dict[str, Argument] = {}  # shapes, axes and factors: Python values for tracing
        self._buffer_names: dict[str, str] = {}  # ONNX names may contain dots, buffer names must not
        factors = {name for step in steps if step.op == "Resize" for name in step.inputs[2:3]}
        for name in dict.fromkeys(name for step in steps for name in step.inputs if name in constants):
            value = constants[name]
            if value.is_floating_point() and name not in factors:
                self._buffer_names[name] = f"weight_{len(self._buffer_names)}"
                # Convolutions run in channels-last layout if their weights have it, which makes backward faster on
                # CPUs.
                layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
                self.register_buffer(self._buffer_names[name], value.contiguous(memory_format=layout))
            else:
                self._arguments[name] = value.tolist()
        self.eval()

    def forward(self, x: Tensor) -> Any:
        """Compute the outputs for the input `x` (float32, batch first), as a tuple in the order of `output_names`."""
        values: dict[str, Argument] = {self._input: x, "": None, **self._arguments}
        values |= {name: self.get_buffer(buffer) for name, buffer in self._buffer_names.items()}
        for step in self._steps:
            arguments = [values[name] for name in step.inputs]
            values[step.output] = OPERATIONS[step.op](*arguments, **step.attributes)
            for name in step.release:
                del values[name]
        return tuple(values[name] for name in self.output_names)

    def extra_repr(self) -> str:
        """Return a digest of the graph without its tensors, which distinguishes graphs with equal weights."""
        # Only constants have tensors as attributes, and those were computed when loading.
        nodes = [(step.op, step.inputs, step.output, sorted(step.attributes.items())) for step in self._steps]
        graph = repr((self._input, self.output_names, nodes, self._arguments, self._buffer_names))
        return f"graph={hashlib.sha256(graph.encode()).hexdigest()[:16]}"

    def _fold_constants(self, steps: list[_Step], constants: dict[str, Tensor]) -> list[_Step]:
        """Check all steps, compute those that read only constants into `constants`, and return the others."""
        remaining = []
        for step in steps:
            operation = OPERATIONS.get(step.op)
            where = f"node {step.name or step.output!r} of {self.path}"
            if operation is None:
                raise ConfigError(f"ONNX operation {step.op} is not supported ({where})")
            try:
                inspect.signature(operation).bind(*step.inputs, **step.attributes)
            except TypeError as error:
                raise ConfigError(f"ONNX operation {step.op}: {error} ({where})") from None
            if not all(name in constants or name == "" for name in step.inputs):
                remaining.append(step)
                continue
            arguments = [constants[name] if name else None for name in step.inputs]
            try:
                constants[step.output] = torch.as_tensor(operation(*arguments, **step.attributes))
            except (RuntimeError, ValueError, TypeError) as error:
                raise ConfigError(f"ONNX operation {step.op} failed on constants: {error} ({where})") from error
        return remaining

    def _only(self, what: str, names: list[str]) -> str:
        if len(names) != 1:
            raise ConfigError(f"{self.path} must have one {what}, but has {len(names)}: {', '.join(names)}")
        return names[0]


class OnnxModule(OnnxGraph):
    """An `OnnxGraph` with one output, which is returned directly.

    Raises:
        ConfigError: the file has several outputs, or is invalid.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._only("output", list(self.output_names))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output for the input `x` (float32, batch first)."""
        (result,) = super().forward(x)
        return result


def load_onnx(path: Path) -> onnx.ModelProto:
    """Return an ONNX model with its external data, which must be in the folder of the file.

    Raises:
        ConfigError: the file is missing or not an ONNX model, or its external data is elsewhere.
    """
    if not path.is_file():
        raise ConfigError(f"no such ONNX file: {path}")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own types of exceptions
        raise ConfigError(f"{path} is not an ONNX model: {error}") from error
    folder = path.parent.resolve()
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _load_external(tensor, path, folder)
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Return all tensors that this module may read from a graph."""
    yield from graph.initializer
    for node in graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def _load_external(tensor: onnx.TensorProto, path: Path, folder: Path) -> None:
    """Load a tensor's external data; after resolving all links, its file must be in `folder`."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    target = (folder / location).resolve()
    if not location or Path(location).is_absolute() or folder not in target.parents:
        raise ConfigError(f"{path} stores the weight {tensor.name} outside its folder: {location!r}")
    try:
        load_external_data_for_tensor(tensor, str(folder))
    except Exception as error:  # onnx raises its own types of exceptions
        raise ConfigError(f"{path}: cannot read the external data {location!r}: {error}") from error
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def _steps(graph: onnx.GraphProto) -> list[_Step]:
    """Return the nodes of a graph in their order, which ONNX requires to be topological."""
    return [
        _Step(
            name=node.name,
            op=node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}",
            inputs=tuple(node.input),
            output=node.output[0],
            attributes=_attributes(node),
        )
        for node in graph.node
    ]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values and tensors, without `auto_pad` if it is NOTSET or VALID."""
    attributes = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = _to_torch(numpy_helper.to_array(value))
        if attribute.name != "auto_pad" or value not in (b"NOTSET", b"VALID"):
            attributes[attribute.name] = value
    return attributes


def _to_torch(array: np.ndarray) -> Tensor:
    """Return a tensor with its own memory; all float types, also those that numpy lacks, become float32."""
    known = array.dtype.kind in "biu"
    return torch.from_numpy(array.copy() if known else array.astype(np.float32))


def _free_batch(steps: list[_Step], constants: dict[str, Tensor]) -> None:
    """Support any batch size: a leading 1 in a Reshape is the batch size that the file was exported with."""
    for step in steps:
        shape = constants.get(step.inputs[1]) if step.op == "Reshape" else None
        if shape is not None and shape.numel() > 1 and shape[0] == 1:
            constants[step.inputs[1]] = torch.cat([torch.zeros_like(shape[:1]), shape[1:]])  # 0: keep


def _fold_batch_norms(steps: list[_Step], constants: dict[str, Tensor], outputs: tuple[str, ...]) -> list[_Step]:
    """Fold each BatchNormalization into the preceding Conv or Gemm, if no other node reads its result."""
    readers: dict[str, int] = dict.fromkeys(outputs, 1)
    for step in steps:
        for name in step.inputs:
            readers[name] = readers.get(name, 0) + 1
    folded: list[_Step] = []
    position: dict[str, int] = {}  # index in `folded` of the step that computes a value
    for step in steps:
        at = position.get(step.inputs[0]) if step.op == "BatchNormalization" else None
        producer = folded[at] if at is not None else None
        if producer is None or readers[producer.output] > 1 or not _foldable(producer, constants):
            position[step.output] = len(folded)
            folded.append(step)
            continue
        weight, bias = _scaled_weights(producer, step, constants)
        names = (f"{step.output}/weight", f"{step.output}/bias")
        constants.update(zip(names, (weight, bias), strict=True))
        assert at is not None
        folded[at] = replace(producer, inputs=(producer.inputs[0], *names), output=step.output)
        position[step.output] = at
    return folded


def _foldable(step: _Step, constants: Mapping[str, Tensor]) -> bool:
    """Return whether a per-channel affine map of the step's result can be folded exactly into its weights."""
    weighted = step.op == "Conv" or (step.op == "Gemm" and step.attributes.get("beta", 1.0) == 1.0)
    return weighted and all(name in constants for name in step.inputs[1:] if name)


def _scaled_weights(step: _Step, norm: _Step, constants: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a Conv or Gemm with the following normalisation folded in, computed in float64."""
    gamma, beta, mean, variance = (constants[name].double() for name in norm.inputs[1:5])
    scale = gamma / torch.sqrt(variance + norm.attributes.get("epsilon", 1e-5))
    weight = constants[step.inputs[1]].double()
    bias_name = "".join(step.inputs[2:])
    bias = constants[bias_name].double() if bias_name else torch.zeros_like(mean)
    channels_last = step.op == "Gemm" and not step.attributes.get("transB", 0)
    shape = (1, -1) if channels_last else (-1, *[1] * (weight.ndim - 1))
    return (weight * scale.reshape(shape)).float(), ((bias - mean) * scale + beta).float()


def _with_releases(steps: list[_Step], outputs: tuple[str, ...]) -> list[_Step]:
    """Return the steps, each with the values that it is the last to read, so that their memory can be freed."""
    seen = set(outputs)
    results = {step.output for step in steps}
    reversed_steps = []
    for step in reversed(steps):
        last_reads = tuple(name for name in dict.fromkeys(step.inputs) if name in results and name not in seen)
        seen.update(last_reads)
        reversed_steps.append(replace(step, release=last_reads))
    return reversed_steps[::-1]
