"""OpenVINO: the fastest backend on most CPUs; fp32 has to be requested explicitly.

Inputs and outputs share memory with torch. Live tensors are bound again when their address changes. A runner has one
infer request, which one thread uses at a time: a request uses all cores anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from frostline.runtime.engines.manifest import NetworkRecord
from frostline.runtime.engines.verification import VerifiedEngine
from frostline.runtime.stage import Network

from .base.backend import Backend, keep_onnx
from .base.options import BuildOptions
from .base.runner import EngineRunner

# Number of cached kernels for shapes seen before. OpenVINO's default is 5000, which a face detector would fill, because
# its shapes vary. A few hundred are enough for all shapes of a rollout.
_CACHED_KERNELS = 512
# Memory is shared through numpy, which has no bfloat16 type: its bytes are passed as another type.
_AS_NUMPY = {torch.bfloat16: torch.int16}


class OpenVino(Backend):
    """Use ONNX files without building: OpenVINO compiles them when it loads them."""

    packages = ("openvino",)
    install = "pip install 'frostline[openvino]'"

    def library(self) -> ModuleType:
        """Import openvino."""
        import openvino

        return openvino

    def version(self) -> str:
        """Return the installed version without the build name."""
        return super().version().split("-")[0]

    def obstacle(self, device: torch.device, target: str) -> str | None:
        """Return why an engine cannot run on `device`, or None."""
        return None if device.type == "cpu" else f"the model is on {device.type}, but OpenVINO is only used on CPUs"

    def build(self, network: Network, source: Path, folder: Path, options: BuildOptions) -> str:
        """Move the ONNX file to `folder`; return its name."""
        return keep_onnx(source, folder)

    def make_runner(
        self, engine: VerifiedEngine, entry: NetworkRecord, network: Network, device: torch.device
    ) -> EngineRunner:
        """Compile one network with OpenVINO."""
        return OpenVinoRunner(engine.onnx(entry.artifact), network)


class OpenVinoRunner(EngineRunner):
    """Run one ONNX file on the CPU.

    Args:
        model: the content of a verified file, or its path.
        network: names of inputs and outputs, and the live tensors to bind.
    Raises:
        EngineError: OpenVINO cannot compile the file.
    """

    library_name = "OpenVINO"
    # Messages of its CPU plugin when memory runs out.
    out_of_memory = ("bad_alloc", "could not allocate", "Cannot allocate memory", "failed to map segment")

    def __init__(self, model: bytes | Path, network: Network) -> None:
        super().__init__(network)
        with self._failures("cannot load"):
            self._request = _compile(model).create_infer_request()
        self._bound: dict[str, Tensor] = {}

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Kept until the end of the run: OpenVINO shares this memory but does not own it.
        contiguous = {name: tensor.detach().contiguous() for name, tensor in inputs.items()}
        self._bind_live()
        for name, tensor in contiguous.items():
            self._request.set_tensor(name, _share(tensor))
        outputs = {name: self._fresh_output(name) for name in self._network.outputs}
        self._request.infer()
        return {name: _to_torch(output) for name, output in outputs.items()}

    def _bind_live(self) -> None:
        """Bind the live tensors that are not bound yet or whose address has changed.

        References to bound tensors are kept, so that no other tensor can be allocated at the same address.
        """
        for name, tensor in self._network.live.items():
            bound = self._bound.get(name)
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()  # a copy that is needed at each call
            elif bound is not None and bound.data_ptr() == tensor.data_ptr() and bound.shape == tensor.shape:
                continue
            self._bound[name] = tensor.detach()
            self._request.set_tensor(name, _share(tensor))

    def _fresh_output(self, name: str) -> Any:
        """Return a new tensor: empty where the output's shape is dynamic, because OpenVINO then resizes it."""
        import openvino

        port = self._request.model_outputs[self._network.outputs.index(name)]
        shape = port.partial_shape
        size = shape.to_shape() if shape.is_static else openvino.Shape([0] * shape.rank.get_length())
        output = openvino.Tensor(port.element_type, size)
        self._request.set_tensor(name, output)
        return output


def _compile(model: bytes | Path) -> Any:
    import openvino

    # On CPUs with bfloat16 instructions, OpenVINO would use them by default.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "CPU_RUNTIME_CACHE_CAPACITY": _CACHED_KERNELS,
    }
    core = openvino.Core()
    return core.compile_model(core.read_model(model), "CPU", settings)


def _share(tensor: Tensor) -> Any:
    """Return the memory of a contiguous tensor as an OpenVINO tensor, which does not keep it alive."""
    import openvino

    tensor = tensor.detach()
    array = tensor.view(_AS_NUMPY.get(tensor.dtype, tensor.dtype)).numpy()
    if tensor.dtype in _AS_NUMPY:
        return openvino.Tensor(array, openvino.Shape(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(array, shared_memory=True)


def _to_torch(output: Any) -> Tensor:
    if output.element_type.to_string() == "bf16":
        return torch.from_numpy(output.data.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(output.data)
