"""The backends by name. A backend is one module here with the furniture of `Backend`, and one line below."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol, cast

import torch

from frostline.errors import ConfigError
from frostline.runtime.stage import Network, Runner
from frostline.runtime.verification import VerifiedEngine

TORCH = "torch"
_MODULES = {"onnxruntime": "onnxruntime"}
ENGINE_BACKENDS = tuple(_MODULES)


class Backend(Protocol):
    """What every backend module offers."""

    # What `build` starts from: a file that ONNX tools read, or an `ExportedProgram` archive.
    SOURCE: Literal["onnx", "exported_program"]

    def unavailable(self) -> str | None:
        """Why this backend cannot run here and what to install, or None."""
        ...

    def version(self) -> str:
        """The version that engines depend on."""
        ...

    def build(self, network: Network, source: Path, folder: Path) -> str:
        """Compile `source`, which may be used up, into `folder`; returns the name of the file to load."""
        ...

    def load(self, engine: VerifiedEngine, networks: Mapping[str, Network], device: torch.device) -> dict[str, Runner]:
        """One runner for each network of the engine's stage."""
        ...


def get_backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _MODULES:
        raise ConfigError(f"unknown backend {name!r}: use one of {', '.join((TORCH, *_MODULES))}")
    return cast(Backend, importlib.import_module(f"frostline.runtime.backends.{_MODULES[name]}"))
