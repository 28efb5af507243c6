"""The backends by name. A backend is one file here with the furniture of `Backend`, and one line below."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from frostline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from frostline.runtime.engines.verification import VerifiedEngine
    from frostline.runtime.stage import Network, Runner

    from .options import BuildOptions

TORCH = "torch"
# The file, and within it the object that is the backend where the file itself is not.
_REGISTRY = {
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt:TENSORRT",
    "tensorrt-rtx": "tensorrt:TENSORRT_RTX",
    "aotinductor": "aotinductor",
    "openvino": "openvino",
}
ENGINE_BACKENDS = tuple(_REGISTRY)


class Backend(Protocol):
    """What every backend offers."""

    # What `build` starts from: a file that ONNX tools read, or torch's own `ExportedProgram`.
    SOURCE: Literal["onnx", "exported_program"]
    # Whether an engine has weights of its own, or computes with those of the PyTorch module.
    HOLDS_WEIGHTS: bool
    # The types of weights that it computes with: of fp32, fp16 and bf16.
    PRECISIONS: frozenset[str]
    # The most elements that a tensor may have, of the network's own as well; None where nothing limits them.
    LARGEST_TENSOR: int | None

    def unavailable(self) -> str | None:
        """Why this backend can neither build nor run here and what to install, or None."""
        ...

    def version(self) -> str:
        """The version that engines depend on."""
        ...

    def target(self, device: torch.device, options: BuildOptions) -> str:
        """What an engine runs on that is built for a stage on `device`: `cpu`, `sm_89` or `sm_89+sm_120`."""
        ...

    def obstacle(self, device: torch.device, target: str) -> str | None:
        """Why an engine for `target` cannot run on `device` of this machine, or None."""
        ...

    def build(self, network: Network, source: Path | ExportedProgram, folder: Path, options: BuildOptions) -> str:
        """Compile `source`, which may be used up, into `folder`; returns the name of the file to load."""
        ...

    def load(self, engine: VerifiedEngine, networks: Mapping[str, Network], device: torch.device) -> dict[str, Runner]:
        """One runner for each network of the engine's stage."""
        ...


def check_backend(name: str) -> None:
    """Hold a name against those of the backends, without importing any.

    Raises:
        ConfigError: it is none of theirs.
    """
    if name not in _REGISTRY:
        raise ConfigError(f"unknown backend {name!r}: use one of {', '.join((TORCH, *_REGISTRY))}")


def module_name(name: str) -> str:
    """The module that a backend is in, which is not imported.

    Raises:
        ConfigError: there is no such backend.
    """
    check_backend(name)
    return f"{__name__}.{_REGISTRY[name].partition(':')[0]}"


def get_backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ConfigError: there is none.
    """
    module = importlib.import_module(module_name(name))
    attribute = _REGISTRY[name].partition(":")[2]
    return cast(Backend, getattr(module, attribute) if attribute else module)
