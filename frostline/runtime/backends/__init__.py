"""List the backends without importing them, and import one by its name.

Each module (a file or a folder) in this package except `base` is one backend. The backend's name is the module's name
with dashes instead of underscores. The module defines one subclass of
`frostline.runtime.backends.base.backend.Backend`.
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
# Order of preference, in lists and among equally fast backends. All others follow by name.
_FIRST = ("onnxruntime", "tensorrt", "tensorrt-rtx")
# Installed with frostline, and available on every machine.
DEFAULT_BACKEND = _FIRST[0]
_NO_BACKEND = "base"


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends, installed or not, in order of preference."""
    found = {_name_of(module) for _, module, _ in pkgutil.iter_modules(__path__) if module != _NO_BACKEND}
    first = tuple(name for name in _FIRST if name in found)
    return (*first, *sorted(found - {*first}))


def check_backend(name: str) -> None:
    """Check that a backend of this name exists.

    Raises:
        ConfigError: it does not exist; the message lists the valid names.
    """
    if name not in (names := backend_names()):
        raise ConfigError(f"unknown backend {name!r}: use one of {', '.join((TORCH, *names))}")


def module_name(name: str) -> str:
    """Return the dotted name of a backend's module.

    Raises:
        ConfigError: there is no such backend.
    """
    check_backend(name)
    return f"{__name__}.{name.replace('-', '_')}"


@cache
def get_backend(name: str) -> Backend:
    """Return the backend of this name. The first call imports its module, and torch.

    Raises:
        ConfigError: there is no such backend.
        TypeError: the module does not define exactly one backend.
    """
    from .base.backend import Backend

    module = importlib.import_module(module_name(name))
    own = (kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__)
    kinds = [kind for kind in own if issubclass(kind, Backend)]
    if len(kinds) != 1:
        raise TypeError(f"{module.__name__} must define one subclass of Backend, but defines {len(kinds)}")
    return kinds[0](name)


def engine_packages() -> tuple[str, ...]:
    """Return the pip packages that engines of any backend need, installed or not. Imports all backends, and torch."""
    return tuple(dict.fromkeys(package for name in backend_names() for package in get_backend(name).packages))


def _name_of(module: str) -> str:
    return module.replace("_", "-")
