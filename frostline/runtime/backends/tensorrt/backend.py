"""Common base of TensorRT and TensorRT-RTX: one builder and one runner for two modules with the same API."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

from frostline.errors import EngineError
from frostline.runtime.backends.base.backend import Backend
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.bounds import bounded
from frostline.runtime.device import device_name, sm_name
from frostline.runtime.engines.manifest import NetworkRecord
from frostline.runtime.engines.verification import VerifiedEngine
from frostline.runtime.stage import Network

from .builder import PlanBuilder
from .runner import TensorRTRunner, layer_table
from .runtime_cache import RuntimeCache

# Default targets on a machine without a GPU: Ada and Blackwell.
_USUAL_CAPABILITIES = ("8.9", "12.0")


class TensorRTBackend(Backend):
    """Build and load TensorRT plans: serialised engines, unrelated to the plan of a `Runtime`.

    Networks are strongly typed: the engine uses the types of the ONNX graph. Running an engine requires an NVIDIA
    driver. From the second call of a shape on, a CUDA graph is replayed.
    """

    # The kernels count elements in 32 bits ("the volume of a tensor cannot exceed 2^31-1", NVIDIA/TensorRT#1948).
    largest_tensor = 2**31 - 1
    # Whether it builds for named compute capabilities on any machine, or only for the GPU of this machine.
    cross_builds: ClassVar[bool]

    @abstractmethod
    def library(self) -> Any:
        """Import the module, `tensorrt` or `tensorrt_rtx`."""

    def target(self, device: torch.device, options: BuildOptions) -> str:
        """Return the requested GPUs, otherwise this machine's GPU, otherwise the default targets.

        Raises:
            EngineError: this machine's GPU is requested, but there is none.
        """
        wanted = options.compute_capabilities
        if not wanted and self.cross_builds and not torch.cuda.is_available():
            wanted = _USUAL_CAPABILITIES
        return "+".join(dict.fromkeys(map(self._sm_name, wanted or ("current",))))

    def _sm_name(self, capability: str) -> str:
        if capability != "current":
            return sm_name(capability)
        if not torch.cuda.is_available():
            advice = (
                ": name a compute capability, such as 8.9"
                if self.cross_builds
                else ", and it only builds for the GPU of this machine"
            )
            raise EngineError(f"{self.name} finds no NVIDIA GPU on this machine{advice}")
        return device_name(torch.device("cuda", torch.cuda.current_device()))

    def obstacle(self, device: torch.device, target: str) -> str | None:
        """Return why an engine for `target` cannot run on `device`, or None."""
        if not torch.cuda.is_available():
            return "no NVIDIA driver"
        if device.type != "cuda":
            return f"the model is on {device.type}, but TensorRT requires a GPU"
        if device_name(device) not in target.split("+"):
            return f"the engine is built for {target}, but this GPU is {device_name(device)}"
        return None

    def check_target(self, target: str) -> None:
        """Check, before tracing, that this machine can build engines for `target`.

        Raises:
            EngineError: it cannot; the message names the possible targets.
        """
        self._capabilities(target)

    def build(self, network: Network, source: Path, folder: Path, options: BuildOptions) -> str:
        """Compile the ONNX file to `<network>.plan`; return the name of the file.

        Raises:
            EngineError: TensorRT cannot parse or compile it; the message includes TensorRT's own message.
        """
        capabilities = self._capabilities(self.target(network.device, options))
        # TensorRT-RTX measures kernels when it loads an engine, and does not use a timing cache.
        timing_cache = None if self.cross_builds else options.timing_cache
        plan = PlanBuilder(self.library(), capabilities, timing_cache).build(network, source, options.progress)
        name = f"{network.name}.plan"
        (folder / name).write_bytes(plan)
        return name

    def _capabilities(self, target: str) -> list[Any]:
        """Return the members of `ComputeCapability` for a target; none for a module that builds for this GPU only."""
        names = target.split("+")
        if not self.cross_builds:
            if names != [self._sm_name("current")]:
                raise EngineError(
                    f"{self.name} builds only for the GPU of this machine, not for {target}: use tensorrt-rtx"
                )
            return []
        trt = self.library()
        known = trt.ComputeCapability.__members__
        capabilities = {name: known.get(name.upper().replace("_", "")) for name in names}
        if unknown := [name for name, capability in capabilities.items() if capability is None]:
            offered = ", ".join(name for name in known if name.startswith("SM"))
            raise EngineError(f"{self.name} {trt.__version__} does not build for {unknown[0]}, only for {offered}")
        return [*capabilities.values()]

    def make_runner(
        self, engine: VerifiedEngine, entry: NetworkRecord, network: Network, device: torch.device
    ) -> TensorRTRunner:
        """Deserialise a plan, for the range of shapes that it was built for."""
        served = bounded(network, {tensor.name: tensor.max for tensor in entry.inputs})
        # Store the kernels that TensorRT-RTX compiles at run time.
        cache = RuntimeCache(engine, entry.artifact) if self.cross_builds else None
        return TensorRTRunner(self.library(), engine.read(entry.artifact), served, device, cache)

    def layers(self, engine: VerifiedEngine, device: torch.device) -> dict[str, Any]:
        """Return the engine inspector's information about every layer, by network.

        Raises:
            EngineError: this machine cannot run the engine, or TensorRT cannot load it.
        """
        self.check_runs(engine, device)
        trt = self.library()
        with torch.cuda.device(device):
            return {
                entry.name: json.loads(layer_table(trt, engine.read(entry.artifact), entry.name))
                for entry in engine.manifest.networks
            }
