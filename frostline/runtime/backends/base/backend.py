"""The base class of all backends: requirements, building and loading of engines."""

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
    """Build engines with one library, and load them.

    A subclass contains everything that is specific to a backend; only the order of preference in the package's
    `__init__` also names backends. Commands that must not import torch read the source of the backend's module: the
    backend's name is the module's name, and engine keys depend on the module's code and on the versions of what it
    imports.

    Args:
        name: the name of the backend in settings and manifests.
    """

    # The input of `build`: an ONNX file, or torch's `ExportedProgram`.
    source: ClassVar[Literal["onnx", "exported_program"]] = "onnx"
    # Whether an engine contains its weights, or uses those of the PyTorch module.
    holds_weights: ClassVar[bool] = True
    # Supported weight types: any of fp32, fp16 and bf16.
    precisions: ClassVar[frozenset[str]] = frozenset(DTYPES)
    # The maximum number of elements of a tensor, including intermediate ones; None if there is no limit.
    largest_tensor: ClassVar[int | None] = None
    # The pip packages that its engines need; reports state their versions.
    packages: ClassVar[tuple[str, ...]]
    # The command that installs missing packages.
    install: ClassVar[str]

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def library(self) -> ModuleType:
        """Import the library and return it. The import must be an `import` statement, so that engine keys depend on its
        version.
        """

    def unavailable(self) -> str | None:
        """Return why this machine can neither build nor run engines of this backend, and what to install, or None."""
        try:
            self.library()
        except (ImportError, OSError, RuntimeError) as error:
            return f"{self.name} cannot be imported ({error}): {self.install}"
        return None

    def version(self) -> str:
        """Return the installed version of the library; engine keys depend on it."""
        return self.library().__version__

    def target(self, device: torch.device, options: BuildOptions) -> str:
        """Return the target of an engine that is built for a stage on `device`: `cpu`, `sm_89` or `sm_89+sm_120`.

        Raises:
            EngineError: `options` require hardware that this machine does not have.
        """
        return device_name(device)

    def check_target(self, target: str) -> None:  # noqa: B027 - most build for any target
        """Check, before tracing, that this machine can build engines for `target`.

        Raises:
            EngineError: it cannot; the message names the possible targets.
        """

    def obstacle(self, device: torch.device, target: str) -> str | None:
        """Return why an engine for `target` cannot run on `device`, or None.

        The target is part of an engine's key. Only a backend that builds for GPUs other than that of `device` has to
        check it here.
        """
        return None

    @abstractmethod
    def build(self, network: Network, source: Any, folder: Path, options: BuildOptions) -> str:
        """Compile a network into `folder`.

        Args:
            source: path of an ONNX file, or an `ExportedProgram`, depending on `self.source`. It may be consumed.
        Returns:
            The name of the file to load.
        Raises:
            EngineError: the network cannot be compiled.
        """

    def load(self, engine: VerifiedEngine, networks: Mapping[str, Network], device: torch.device) -> dict[str, Runner]:
        """Load an engine: one runner for each network of its stage, by name.

        Raises:
            EngineError: this machine cannot run the engine, or the library rejects it.
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
        """Load one network of an engine that can run on this machine.

        Args:
            entry: the network's record in the manifest.
        Raises:
            EngineError: the library rejects the engine.
        """

    def check_runs(self, engine: VerifiedEngine, device: torch.device) -> None:
        """Check that an engine can run on `device` (see `obstacle`).

        Raises:
            EngineError: it cannot; the message names the engine, its target and the reason.
        """
        manifest = engine.manifest
        if reason := self.obstacle(device, manifest.device):
            capabilities = compute_capabilities(manifest.device)
            built_for = f" (compute capability {', '.join(capabilities)})" if capabilities else ""
            raise EngineError(
                f"the {manifest.backend} engine of {manifest.stage}{built_for} is built, not verified here: {reason}"
            )


def keep_onnx(source: Path, folder: Path) -> str:
    """Move an ONNX file and its external weights into `folder`, for backends that compile when they load.

    Returns:
        The name of the file.
    """
    for path in sorted(source.parent.glob(f"{source.name}*")):
        path.rename(folder / path.name)
    return source.name
