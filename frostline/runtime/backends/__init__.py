"""The backends by name, found without importing any.

Each module in here but `base`, a file or a folder, is one backend. It is called as its module, with dashes for
underscores, and defines one subclass of `frostline.runtime.backends.base.backend.Backend`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from frostline.errors import ConfigError

if TYPE_CHECKING:
    from .base.backend import Backend

TORCH = "torch"
# Which come first in lists, and of equally fast ones: no backend can say that of itself. The others follow by name.
_FIRST = ("onnxruntime", "tensorrt", "tensorrt-rtx")
# It is installed with frostline, and runs everywhere.
DEFAULT_BACKEND = _FIRST[0]
_NO_BACKEND = "base"


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends, installed or not, in order of preference."""
    found = {_name_of(module) for _, module, _ in pkgutil.iter_modules(__path__) if module != _NO_BACKEND}
    first = tuple(name for name in _FIRST if name in found)
    return (*first, *sorted(found - {*first}))


def check_backend(name: str) -> None:
    """Check that there is a backend of this name.

    Raises:
        ConfigError: there is none; the message lists those that there are.
    """
    if name not in (names := backend_names()):
        raise ConfigError(f"unknown backend {name!r}: use one of {', '.join((TORCH, *names))}")


def module_name(name: str) -> str:
    """Return the dotted name of the module that a backend is in.

    Raises:
        ConfigError: there is no such backend.
    """
    check_backend(name)
    return f"{__name__}.{name.replace('-', '_')}"


@cache
def get_backend(name: str) -> Backend:
    """Return the backend of this name; the first call imports its module, and torch.

    Raises:
        ConfigError: there is none.
        TypeError: its module does not define it.
    """
    from .base.backend import Backend

    module = importlib.import_module(module_name(name))
    own = (kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__)
    kinds = [kind for kind in own if issubclass(kind, Backend)]
    if len(kinds) != 1:
        raise TypeError(f"{module.__name__} must define one subclass of Backend, and defines {len(kinds)}")
    return kinds[0](name)


def engine_packages() -> tuple[str, ...]:
    """Return the pip packages that engines run on, installed or not; imports all backends, and torch."""
    return tuple(dict.fromkeys(package for name in backend_names() for package in get_backend(name).packages))


def _name_of(module: str) -> str:
    return module.replace("_", "-")
