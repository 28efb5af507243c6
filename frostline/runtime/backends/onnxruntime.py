"""ONNX Runtime: available on every machine.

Inputs, outputs and live tensors are shared with torch through DLPack without copying. Every call has its own binding,
so any number of threads can share a session.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frostline.errors import EngineError
from frostline.runtime.engines.manifest import NetworkRecord
from frostline.runtime.engines.verification import VerifiedEngine
from frostline.runtime.stage import Network

from .base.backend import Backend, keep_onnx
from .base.options import BuildOptions
from .base.runner import EngineRunner

if TYPE_CHECKING:
    import onnxruntime

_CPU = "CPUExecutionProvider"
_PROVIDERS = {"cpu": _CPU, "cuda": "CUDAExecutionProvider"}
_CUDA_SETTINGS = {
    # TF32 has a mantissa of 10 bits: fp32 engines would differ from PyTorch.
    "use_tf32": "0",
    # An exhaustive search would try every algorithm at each new shape, and the shapes of a face detector vary.
    "cudnn_conv_algo_search": "HEURISTIC",
}
# Operations that ONNX Runtime runs on the host by design, even for a GPU: they compute shapes, a few integers.
_SHAPE_ARITHMETIC = frozenset(
    (
        *("Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Gather", "Identity", "Mod", "Mul"),
        *("Neg", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
    )
)


class OnnxRuntime(Backend):
    """Use ONNX files without building: ONNX Runtime optimises them when it loads them."""

    # Up to opset 21, ONNX has no bf16 convolution, and the providers lack further bf16 operations.
    precisions = frozenset({"fp32", "fp16"})
    packages = ("onnxruntime-gpu", "onnxruntime")
    install = "pip install onnxruntime-gpu"

    def library(self) -> ModuleType:
        """Import onnxruntime."""
        import onnxruntime

        return onnxruntime

    def build(self, network: Network, source: Path, folder: Path, options: BuildOptions) -> str:
        """Move the ONNX file to `folder`; return its name."""
        return keep_onnx(source, folder)

    def make_runner(
        self, engine: VerifiedEngine, entry: NetworkRecord, network: Network, device: torch.device
    ) -> EngineRunner:
        """Open an ONNX Runtime session for one network."""
        return OnnxRuntimeRunner(engine.onnx(entry.artifact), network, device)


class OnnxRuntimeRunner(EngineRunner):
    """Run one ONNX file.

    Args:
        model: the content of a verified file, or its path.
        network: names of inputs and outputs, and the live tensors to bind.
        device: the device of the tensors.
    Raises:
        EngineError: the file cannot be loaded, or part of the graph would run on another provider.
    """

    library_name = "ONNX Runtime"
    # Messages of its arenas and of CUDA when memory runs out; its exceptions have no type for that.
    out_of_memory = ("Failed to allocate memory for requested buffer", "CUDA failure 2: out of memory", "bad_alloc")
    one_call_at_a_time = False

    def __init__(self, model: bytes | Path, network: Network, device: torch.device) -> None:
        super().__init__(network)
        self._device = device
        with self._failures("cannot load"):
            self._session = _open_session(model, network.name, device)

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        network = self._network
        binding = self._session.io_binding()
        # Keep references until the run ends: a binding does not own its tensors.
        kept = {name: tensor.contiguous() for name, tensor in {**network.live, **inputs}.items()}
        for name, tensor in kept.items():
            _bind(binding, name, tensor)
        for name in network.outputs:
            binding.bind_output(name, self._device.type, self._device.index or 0)
        if self._device.type == "cuda":
            # ONNX Runtime uses its own stream, so the inputs must be ready.
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        return {
            name: torch.from_dlpack(value) for name, value in zip(network.outputs, binding.get_outputs(), strict=True)
        }


def _bind(binding: onnxruntime.IOBinding, name: str, tensor: Tensor) -> None:
    import onnxruntime

    value: Any = onnxruntime.OrtValue.from_dlpack(tensor.detach())
    if value.data_ptr() != tensor.data_ptr():
        raise EngineError(f"ONNX Runtime copied input {name} instead of sharing its memory")
    binding.bind_ortvalue_input(name, value)


def _open_session(model: bytes | Path, name: str, device: torch.device) -> onnxruntime.InferenceSession:
    import onnxruntime

    # Log errors only. They also raise exceptions, and warnings about providers do not help the user.
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Spinning threads of two pools (torch's and this one) would compete for the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    provider = _PROVIDERS.get(device.type)
    if provider is None:
        raise EngineError(f"ONNX Runtime has no provider for {device.type} on this machine")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    arguments = {} if device.type == "cpu" else {"device_id": str(device.index or 0), **_CUDA_SETTINGS}
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=[(provider, arguments)])
    if session.get_providers()[0] != provider:
        raise EngineError(f"ONNX Runtime has no {provider} on this machine, only {', '.join(session.get_providers())}")
    if provider != _CPU and (strays := _left_to_the_cpu(session)):
        raise EngineError(f"ONNX Runtime would run part of {name} on the CPU, copying back and forth: {strays}")
    return session


def _left_to_the_cpu(session: onnxruntime.InferenceSession) -> str:
    """Return the operations that the provider does not implement, and that ONNX Runtime silently runs on the CPU."""
    counts = Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == _CPU
        for node in part.get_nodes()
    )
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if name not in _SHAPE_ARITHMETIC)
