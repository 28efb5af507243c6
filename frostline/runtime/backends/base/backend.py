"""What every backend is: one class, which says what it needs, builds engines and loads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch

from frostline.errors import EngineError
from frostline.models.precision import DTYPES
from frostline.runtime.device import compute_capabilities, device_name
from frostline.runtime.engines.manifest import NetworkRecord
from frostline.runtime.engines.verification import VerifiedEngine
from frostline.runtime.stage import Network, Runner

from .options import BuildOptions
from .runner import EngineRunner


class Backend(ABC):
    """Builds engines with one library, and loads them.

    Everything that frostline knows of a backend is in here: nothing else names a backend or its packages. What a
    command needs to know without importing torch is read from the source of the backend's module: its name is the
    module's, and engines depend on the module's code and on the versions of what it imports.

    Args:
        name: by which settings and manifests call it.
    """

    # What `build` starts from: a file that ONNX tools read, or torch's own `ExportedProgram`.
    source: ClassVar[Literal["onnx", "exported_program"]] = "onnx"
    # Whether an engine has weights of its own, or computes with those of the PyTorch module.
    holds_weights: ClassVar[bool] = True
    # The types of weights that it computes with: of fp32, fp16 and bf16.
    precisions: ClassVar[frozenset[str]] = frozenset(DTYPES)
    # The most elements that a tensor may have, of the network's own as well; None where nothing limits them.
    largest_tensor: ClassVar[int | None] = None
    # The pip packages that its engines run on, whose versions reports state.
    packages: ClassVar[tuple[str, ...]]
    # The command that installs what is missing.
    install: ClassVar[str]

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def library(self) -> ModuleType:
        """Import the library and return it; by an `import` statement, which makes its version part of engine keys."""

    def unavailable(self) -> str | None:
        """Return why this backend can neither build nor run here and what to install, or None."""
        try:
            self.library()
        except (ImportError, OSError, RuntimeError) as error:
            return f"{self.name} cannot be imported ({error}): {self.install}"
        return None

    def version(self) -> str:
        """Return the installed version, which engines depend on."""
        return self.library().__version__

    def target(self, device: torch.device, options: BuildOptions) -> str:
        """Return what an engine runs on that is built for a stage on `device`: `cpu`, `sm_89` or `sm_89+sm_120`.

        Raises:
            EngineError: `options` ask for what this machine lacks.
        """
        return device_name(device)

    def check_target(self, target: str) -> None:  # noqa: B027 - most build for any target
        """Check that engines for `target` can be built here, before anything is traced for it.

        Raises:
            EngineError: they cannot; the message names the targets that can.
        """

    def obstacle(self, device: torch.device, target: str) -> str | None:
        """Return why an engine for `target` cannot run on `device` of this machine, or None.

        The target is part of an engine's key: only what else is in the way has to be told.
        """
        return None

    @abstractmethod
    def build(self, network: Network, source: Any, folder: Path, options: BuildOptions) -> str:
        """Compile a network into `folder`.

        Args:
            source: the path of an ONNX file, or an `ExportedProgram`, as `self.source` says; it may be used up.
        Returns:
            The name of the file to load.
        Raises:
            EngineError: it cannot be compiled.
        """

    def load(self, engine: VerifiedEngine, networks: Mapping[str, Network], device: torch.device) -> dict[str, Runner]:
        """Load an engine: one runner for each network of its stage, by name.

        Raises:
            EngineError: it cannot run here, or the library refuses it.
        """
        self.check_runs(engine, device)
        return {
            entry.name: self.make_runner(engine, entry, networks[entry.name], device)
            for entry in engine.manifest.networks
        }

    @abstractmethod
    def make_runner(
        self, engine: VerifiedEngine, entry: NetworkRecord, network: Network, device: torch.device
    ) -> EngineRunner:
        """Load one network of an engine that nothing keeps from running here.

        Args:
            entry: what the manifest says of the network.
        Raises:
            EngineError: the library refuses it.
        """

    def check_runs(self, engine: VerifiedEngine, device: torch.device) -> None:
        """Check that nothing keeps an engine from running on `device` (`obstacle`).

        Raises:
            EngineError: names the engine, what it was built for, and the obstacle.
        """
        manifest = engine.manifest
        if reason := self.obstacle(device, manifest.device):
            capabilities = compute_capabilities(manifest.device)
            built_for = f" (compute capability {', '.join(capabilities)})" if capabilities else ""
            raise EngineError(
                f"the {manifest.backend} engine of {manifest.stage}{built_for} is built, not verified here: {reason}"
            )


def keep_onnx(source: Path, folder: Path) -> str:
    """Move an ONNX file, and the weights beside it, into `folder`: an engine for what compiles as it loads.

    Returns:
        The name of the file.
    """
    for path in sorted(source.parent.glob(f"{source.name}*")):
        path.rename(folder / path.name)
    return source.name
