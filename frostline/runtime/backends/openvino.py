"""OpenVINO: the fastest of the engines on most CPUs, in fp32 because it is told so.

Inputs and outputs share memory with torch. Live tensors are bound again when their address changes. A runner has one
infer request, which one thread uses at a time: it takes all cores anyway.
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

# Kernels that are kept for shapes seen before. OpenVINO's own number is 5000, and a face detector's shapes never end. A
# few hundred are enough for every shape that a rollout takes in turn.
_CACHED_KERNELS = 512
# numpy, through which memory is shared, has no bfloat16: its bytes travel under another name.
_AS_NUMPY = {torch.bfloat16: torch.int16}


class OpenVino(Backend):
    """ONNX files as they are: OpenVINO compiles them as it loads."""

    packages = ("openvino",)
    install = "pip install 'frostline[openvino]'"

    def library(self) -> ModuleType:
        """Import openvino."""
        import openvino

        return openvino

    def version(self) -> str:
        """Return the installed version, without the build's name."""
        return super().version().split("-")[0]

    def obstacle(self, device: torch.device, target: str) -> str | None:
        """Return why it cannot run on `device`, or None."""
        return None if device.type == "cpu" else f"the model is on {device.type}, and OpenVINO serves CPUs here"

    def build(self, network: Network, source: Path, folder: Path, options: BuildOptions) -> str:
        """Keep the ONNX file."""
        return keep_onnx(source, folder)

    def make_runner(
        self, engine: VerifiedEngine, entry: NetworkRecord, network: Network, device: torch.device
    ) -> EngineRunner:
        """Compile a model."""
        return OpenVinoRunner(engine.onnx(entry.artifact), network)


class OpenVinoRunner(EngineRunner):
    """Runs one ONNX file on the CPU.

    Args:
        model: the content of a verified file, or its path.
        network: names of inputs and outputs, and the live tensors to bind.
    Raises:
        EngineError: OpenVINO cannot compile the file.
    """

    library_name = "OpenVINO"
    # How its CPU plugin says that memory ran out.
    out_of_memory = ("bad_alloc", "could not allocate", "Cannot allocate memory", "failed to map segment")

    def __init__(self, model: bytes | Path, network: Network) -> None:
        super().__init__(network)
        with self._failures("cannot load"):
            self._request = _compile(model).create_infer_request()
        self._bound: dict[str, Tensor] = {}

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Kept until the run is over: OpenVINO shares this memory but does not own it.
        contiguous = {name: tensor.detach().contiguous() for name, tensor in inputs.items()}
        self._bind_live()
        for name, tensor in contiguous.items():
            self._request.set_tensor(name, _share(tensor))
        outputs = {name: self._fresh_output(name) for name in self._network.outputs}
        self._request.infer()
        return {name: _to_torch(output) for name, output in outputs.items()}

    def _bind_live(self) -> None:
        """Bind the live tensors that are not bound yet, or whose address has changed.

        Bound tensors are referenced, so that no other tensor can be allocated at their address.
        """
        for name, tensor in self._network.live.items():
            bound = self._bound.get(name)
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()  # a copy, which has to be made at each call
            elif bound is not None and bound.data_ptr() == tensor.data_ptr() and bound.shape == tensor.shape:
                continue
            self._bound[name] = tensor.detach()
            self._request.set_tensor(name, _share(tensor))

    def _fresh_output(self, name: str) -> Any:
        """Return an empty tensor, which OpenVINO grows to the output's shape."""
        import openvino

        port = self._request.model_outputs[self._network.outputs.index(name)]
        output = openvino.Tensor(port.element_type, openvino.Shape([0] * port.partial_shape.rank.get_length()))
        self._request.set_tensor(name, output)
        return output


def _compile(model: bytes | Path) -> Any:
    import openvino

    # On CPUs with bfloat16 instructions, OpenVINO would use them unasked.
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
