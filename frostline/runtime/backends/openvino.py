"""OpenVINO: the fastest of the engines on most CPUs, in fp32 because it is told so.

Inputs and outputs share memory with torch. Live tensors are bound again where they lie elsewhere. A runner has one
infer request, which one thread uses at a time: it takes all cores anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from frostline.errors import EngineError
from frostline.models.precision import DTYPES
from frostline.runtime.device import device_name
from frostline.runtime.engines.verification import VerifiedEngine
from frostline.runtime.stage import Network, Runner

from .inputs import check_inputs, check_live
from .memory import engine_failure
from .options import BuildOptions

SOURCE: Literal["onnx"] = "onnx"
HOLDS_WEIGHTS = True
PRECISIONS = frozenset(DTYPES)
LARGEST_TENSOR: int | None = None

# How its CPU plugin says that memory ran out.
_NO_MEMORY = ("bad_alloc", "could not allocate", "Cannot allocate memory", "failed to map segment")
# Kernels that are kept for shapes seen before. OpenVINO's own number is 5000, and a face detector's shapes never end. A
# few hundred are enough for every shape that a rollout takes in turn.
_CACHED_KERNELS = 512
# numpy, through which memory is shared, has no bfloat16: its bytes travel under another name.
_AS_NUMPY = {torch.bfloat16: torch.int16}


def unavailable() -> str | None:
    """Why OpenVINO cannot run here, or None."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        return f"openvino cannot be imported ({error}): pip install 'frostline[openvino]'"
    return None


def version() -> str:
    """The installed version, without the build's name."""
    import openvino

    return openvino.__version__.split("-")[0]


def target(device: torch.device, options: BuildOptions) -> str:
    """The device that the stage is on."""
    return device_name(device)


def obstacle(device: torch.device, target: str) -> str | None:
    """Why it cannot run on `device`, or None."""
    return None if device.type == "cpu" else f"the model is on {device.type}, and OpenVINO serves CPUs here"


def build(network: Network, source: Path, folder: Path, options: BuildOptions) -> str:
    """An ONNX file is an engine already; OpenVINO compiles it as it loads."""
    for path in sorted(source.parent.glob(f"{source.name}*")):
        path.rename(folder / path.name)
    return source.name


def load(engine: VerifiedEngine, networks: Mapping[str, Network], device: torch.device) -> dict[str, Runner]:
    """One compiled model for each network.

    Raises:
        EngineError: the model is not on the CPU, or OpenVINO cannot compile a network.
    """
    if reason := obstacle(device, engine.manifest.device):
        raise EngineError(f"the openvino engine of {engine.manifest.stage} cannot run: {reason}")
    return {
        entry.name: OpenVinoRunner(engine.onnx(entry.artifact), networks[entry.name])
        for entry in engine.manifest.networks
    }


class OpenVinoRunner:
    """Runs one ONNX file on the CPU.

    Args:
        model: the content of a verified file, or its path.
        network: names of inputs and outputs, and the live tensors to bind.
    Raises:
        EngineError: OpenVINO cannot compile the file.
    """

    def __init__(self, model: bytes | Path, network: Network) -> None:
        check_live(network)
        self._network = network
        try:
            self._request = _compile(model).create_infer_request()
        except RuntimeError as error:
            raise engine_failure(f"OpenVINO cannot load {network.name}", error, _NO_MEMORY) from error
        self._lock = threading.Lock()
        self._bound: dict[str, Tensor] = {}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the network; every output is freshly allocated and shared with torch."""
        check_inputs(self._network, inputs)
        # Kept until the run is over: OpenVINO shares this memory but does not own it.
        contiguous = {name: tensor.detach().contiguous() for name, tensor in inputs.items()}
        with self._lock:
            self._bind_live()
            for name, tensor in contiguous.items():
                self._request.set_tensor(name, _share(tensor))
            outputs = {name: self._fresh_output(name) for name in self._network.outputs}
            try:
                self._request.infer()
            except RuntimeError as error:
                raise engine_failure(f"OpenVINO failed on {self._network.name}", error, _NO_MEMORY) from error
        return {name: _to_torch(output) for name, output in outputs.items()}

    def _bind_live(self) -> None:
        """Bind the live tensors that are not bound yet, or lie elsewhere than before.

        What is bound is kept, so that no other tensor can come to lie at its address.
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
        """An empty tensor, which OpenVINO grows to the output's shape."""
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
    """The memory of a contiguous tensor as an OpenVINO tensor, which does not keep it alive."""
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
