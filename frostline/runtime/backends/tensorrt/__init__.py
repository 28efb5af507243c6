"""TensorRT and TensorRT-RTX: one builder and one runner for two modules with the same API.

Networks are strongly typed: the types in the ONNX graph are those of the engine. TensorRT-RTX builds for a named
compute capability on any machine, TensorRT for the GPU that it finds. Running takes an NVIDIA driver; from the second
call of a shape on it is the replay of a CUDA graph.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from frostline.errors import EngineError
from frostline.models.precision import DTYPES
from frostline.runtime.backends.options import BuildOptions
from frostline.runtime.bounds import bounded
from frostline.runtime.device import compute_capabilities, device_name, sm_name
from frostline.runtime.engines.verification import VerifiedEngine
from frostline.runtime.stage import Network, Runner

from .builder import PlanBuilder
from .runner import TensorRTRunner, layer_table
from .runtime_cache import RuntimeCache

__all__ = ["TENSORRT", "TENSORRT_RTX", "TensorRTBackend", "TensorRTRunner"]

# Raise it when engines are built in another way: 2 bounds their range of shapes, and sizes scratch memory by the call.
_BUILD = 2
# What TensorRT-RTX builds for where no GPU says otherwise: Ada and Blackwell.
_USUAL_CAPABILITIES = ("8.9", "12.0")


class TensorRTBackend:
    """The furniture of `Backend` for one of the two modules.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
        extra: the extra of frostline that installs it.
        cross_builds: whether it builds for GPUs that this machine lacks.
    """

    SOURCE: Literal["onnx"] = "onnx"
    HOLDS_WEIGHTS = True
    PRECISIONS = frozenset(DTYPES)
    # Its kernels count elements in 32 bits ("the volume of a tensor cannot exceed 2^31-1", NVIDIA/TensorRT#1948).
    LARGEST_TENSOR: int | None = 2**31 - 1

    def __init__(self, module: str, extra: str, cross_builds: bool) -> None:
        self._module = module
        self._extra = extra
        self._cross_builds = cross_builds

    def unavailable(self) -> str | None:
        """Why the module cannot be used, or None."""
        try:
            self._import()
        except (ImportError, OSError, RuntimeError) as error:
            return f"{self._module} cannot be imported ({error}): pip install 'frostline[{self._extra}]'"
        return None

    def version(self) -> str:
        """The installed version, and that of how engines are built with it."""
        return f"{self._import().__version__}+build{_BUILD}"

    def target(self, device: torch.device, options: BuildOptions) -> str:
        """The GPUs asked for, else this machine's, else the usual ones.

        Raises:
            EngineError: a GPU of this machine is wanted, and there is none.
        """
        wanted = options.compute_capabilities
        if not wanted and self._cross_builds and not torch.cuda.is_available():
            wanted = _USUAL_CAPABILITIES
        return "+".join(dict.fromkeys(map(self._sm_name, wanted or ("current",))))

    def _sm_name(self, capability: str) -> str:
        if capability != "current":
            return sm_name(capability)
        if not torch.cuda.is_available():
            advice = (
                ": name a compute capability, such as 8.9" if self._cross_builds else ", and it builds for no other"
            )
            raise EngineError(f"{self._module} finds no NVIDIA GPU here{advice}")
        return device_name(torch.device("cuda", torch.cuda.current_device()))

    def obstacle(self, device: torch.device, target: str) -> str | None:
        """Why an engine for `target` cannot run on `device`, or None."""
        if not torch.cuda.is_available():
            return "no NVIDIA driver"
        if device.type != "cuda":
            return f"the model is on the {device.type}, and TensorRT runs on GPUs"
        if device_name(device) not in target.split("+"):
            return f"it is built for {target}, and this GPU is {device_name(device)}"
        return None

    def check_target(self, target: str) -> None:
        """Refuse a target that engines cannot be built for here, before anything is traced for it.

        Raises:
            EngineError: names what it builds for.
        """
        self._capabilities(target)

    def build(self, network: Network, source: Path, folder: Path, options: BuildOptions) -> str:
        """Compile the ONNX file to `<network>.plan`.

        Raises:
            EngineError: TensorRT cannot parse or compile it; the message holds TensorRT's own.
        """
        capabilities = self._capabilities(self.target(network.device, options))
        # TensorRT-RTX measures when it loads an engine, and keeps no timing cache.
        timing_cache = None if self._cross_builds else options.timing_cache
        plan = PlanBuilder(self._import(), capabilities, timing_cache).build(network, source, options.progress)
        name = f"{network.name}.plan"
        (folder / name).write_bytes(plan)
        return name

    def _capabilities(self, target: str) -> list[Any]:
        """The members of `ComputeCapability` for a target; none for a module that builds for this GPU only."""
        names = target.split("+")
        if not self._cross_builds:
            if names != [self._sm_name("current")]:
                raise EngineError(
                    f"{self._module} builds only for the GPU of this machine, not for {target}: use tensorrt-rtx"
                )
            return []
        trt = self._import()
        known = trt.ComputeCapability.__members__
        capabilities = {name: known.get(name.upper().replace("_", "")) for name in names}
        if unknown := [name for name, capability in capabilities.items() if capability is None]:
            offered = ", ".join(name for name in known if name.startswith("SM"))
            raise EngineError(f"{self._module} {trt.__version__} does not build for {unknown[0]}, only for {offered}")
        return [*capabilities.values()]

    def load(self, engine: VerifiedEngine, networks: Mapping[str, Network], device: torch.device) -> dict[str, Runner]:
        """One runner for each network, for the range of shapes that its engine was built for.

        Raises:
            EngineError: it cannot run here, or TensorRT refuses it.
        """
        self._check_runs(engine, device)
        trt, runners = self._import(), {}
        for entry in engine.manifest.networks:
            shapes = {tensor.name: tensor.max for tensor in entry.inputs}
            network = bounded(networks[entry.name], shapes)
            cache = RuntimeCache(engine, entry.artifact) if self._cross_builds else None
            runners[entry.name] = TensorRTRunner(trt, engine.read(entry.artifact), network, device, cache)
        return runners

    def layers(self, engine: VerifiedEngine, device: torch.device) -> dict[str, Any]:
        """By network, what TensorRT's inspector says of every layer.

        Raises:
            EngineError: it cannot run here, or TensorRT refuses it.
        """
        self._check_runs(engine, device)
        trt = self._import()
        with torch.cuda.device(device):
            return {
                entry.name: json.loads(layer_table(trt, engine.read(entry.artifact), entry.name))
                for entry in engine.manifest.networks
            }

    def _check_runs(self, engine: VerifiedEngine, device: torch.device) -> None:
        manifest = engine.manifest
        if reason := self.obstacle(device, manifest.device):
            built_for = ", ".join(compute_capabilities(manifest.device))
            raise EngineError(
                f"the {manifest.backend} engine of {manifest.stage} (compute capability {built_for}) is built, "
                f"not verified here: {reason}"
            )

    def _import(self) -> ModuleType:
        return importlib.import_module(self._module)


TENSORRT = TensorRTBackend("tensorrt", extra="tensorrt", cross_builds=False)
TENSORRT_RTX = TensorRTBackend("tensorrt_rtx", extra="tensorrt-rtx", cross_builds=True)
