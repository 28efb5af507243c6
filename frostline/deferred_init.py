"""Import single modules of a large package without running its `__init__` files.

`import diffsynth.models.wan_video_dit` first runs `diffsynth/__init__.py`, which imports pandas, modelscope,
torchvision and torch's compiler. This takes several seconds, and the module needs none of them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

# Protects `sys.meta_path` while it is replaced. Nothing is imported while this lock is held.
_META_PATH_LOCK = threading.Lock()


@contextmanager
def deferred_init(package: str) -> Iterator[None]:
    """Import `package` and its subpackages without running their `__init__` files, within the block.

    An `__init__` file runs later, when a missing name of its package is requested: `package.name`, `from package import
    name`, `from package import *` or `dir(package)`. It runs in the module object that is already in `sys.modules`, so
    every module and class exists once, in any order of imports. (`importlib.util.LazyLoader` would run it as soon as a
    submodule is imported.)

    A package that is already imported stays as it is. A package that is not a folder of source files is imported as
    usual.

    Args:
        package: name of a top-level package.
    """
    finder = _Finder(package)
    # Replace the list: another thread may be iterating over it, and would skip a finder after a removal in place.
    with _META_PATH_LOCK:
        sys.meta_path = [finder, *sys.meta_path]
    try:
        yield
    finally:
        with _META_PATH_LOCK:
            sys.meta_path = [other for other in sys.meta_path if other is not finder]


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self._package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.submodule_search_locations is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        spec.loader = _InitLater(spec.loader)
        return spec


class _InitLater(Loader):
    """Loader that creates a package whose `__init__` file runs later, in `run`."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._lock = threading.RLock()
        self._running = False

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loader
        spec.loader_state = self

    def run(self, package: ModuleType) -> bool:
        """Execute the file once; return False for a call from within that file.

        Other threads wait until it has finished. Each package has its own lock, so a deadlock is only possible if the
        `__init__` files of two packages import each other.
        """
        with self._lock:
            if self._running:
                return False
            if type(package) is not ModuleType:
                self._running = True
                try:
                    self._loader.exec_module(package)
                    package.__class__ = ModuleType
                finally:
                    self._running = False
        return True


class _Package(ModuleType):
    """A package whose `__init__` file has not run yet; it becomes a plain module afterwards."""

    def __getattr__(self, name: str) -> object:
        spec = self.__spec__
        if spec is None or not spec.loader_state.run(self):
            raise AttributeError(f"partially initialized module {self.__name__!r} has no attribute {name!r}")
        # The file may have replaced its entry in `sys.modules`.
        return getattr(sys.modules.get(self.__name__, self), name)

    def __dir__(self) -> list[str]:
        if self.__spec__ is not None:
            self.__spec__.loader_state.run(self)
        return [*ModuleType.__dir__(self)]
