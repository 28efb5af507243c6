"""Import a few modules of a large package without what its `__init__` files import.

`import diffsynth.models.wan_video_dit` first runs `diffsynth/__init__.py`. That imports pandas, modelscope, torchvision
and torch's compiler, which takes several seconds, for classes that need none of them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

# Guards the replacement of `sys.meta_path`. Nothing is imported while it is held.
_META_PATH_LOCK = threading.Lock()


@contextmanager
def deferred_init(package: str) -> Iterator[None]:
    """Within the block, import `package` and the packages in it without running their `__init__` files.

    Such a file runs later, when a name that its package does not have yet is asked for: `package.name`,
    `from package import name`, `from package import *`, `dir(package)`. It runs in the module object that was in
    `sys.modules` from the start, so every module and class exists once, whatever the order of imports.
    (`importlib.util.LazyLoader` would run it as soon as one of the submodules is imported.)

    A package that was imported before is used as it is, and one that is no folder of source files is imported as usual.

    Args:
        package: a top-level package.
    """
    finder = _Finder(package)
    # Another thread may be iterating over the list: after a removal in place it would skip a finder.
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
    """Makes a package whose `__init__` file `run` executes."""

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
        """Execute the file unless that was done; return False within a call from that very file.

        Other threads wait until it is done. Each package has a lock of its own: for a deadlock, the `__init__` files of
        two packages would have to import each other.
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
    """A package whose `__init__` file has not been executed; a plain module afterwards."""

    def __getattr__(self, name: str) -> object:
        spec = self.__spec__
        if spec is None or not spec.loader_state.run(self):
            raise AttributeError(f"partially initialized module {self.__name__!r} has no attribute {name!r}")
        # The file may have put another object into its place.
        return getattr(sys.modules.get(self.__name__, self), name)

    def __dir__(self) -> list[str]:
        if self.__spec__ is not None:
            self.__spec__.loader_state.run(self)
        return [*ModuleType.__dir__(self)]
