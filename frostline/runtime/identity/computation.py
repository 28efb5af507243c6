"""The id of a computation: a hash of the code that defines it and of the versions of the packages that it calls.

All reusable results (engines, cached outputs, latencies, export cache, reference faces) are stored under this id, so
that no version number has to be maintained by hand. Sources are read, not imported: commands that only look up results
can compute the id without importing torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import secrets
import sys
from collections.abc import Collection, Iterable
from functools import cache, lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path

from frostline.runtime.identity.syntax import Import, read_syntax

log = logging.getLogger(__name__)

_OWN = "frostline"
# Modules that do not change the outputs of a stage: settings, messages and files; serving and caching; and the renderer
# of the tiny model's clips, because its weights are hashed separately.
_PLUMBING = (
    *(
        f"{_OWN}.{leaf}"
        for leaf in ("atomic_io", "config", "deferred_init", "errors", "package_info", "paths", "progress")
    ),
    *(f"{_OWN}.runtime", f"{_OWN}.runtime.backends.base"),
    f"{_OWN}.models.tiny",
)
# Exceptions: modules in these packages that do change the outputs. The longest matching name of both lists decides.
_COMPUTES = (f"{_OWN}.runtime.backends",)
# Folders of installed packages, whether or not a file list was installed with them.
_SITES = ("site-packages", "dist-packages")
# Replaces code that cannot be read: results that depend on it are valid in this process only.
_THIS_PROCESS = secrets.token_hex(16)


def computation_id(modules: Iterable[str], source_of: Collection[str] = ()) -> str:
    """Return a hash, as 64 hexadecimal digits, of all code that `modules` run, including their own.

    This includes all direct and indirect imports, also those within functions, except the standard library and
    `_PLUMBING`. frostline's modules, and modules that are not installed packages, are hashed by their syntax, ignoring
    comments, docstrings, annotations, formatting and location. Installed packages are represented by their versions.

    Args:
        modules: dotted names, including packages that are called without a visible import.
        source_of: further top-level packages that are hashed by their syntax, installed or not.
    """
    roots = frozenset(modules)
    readable = {_OWN, *source_of}
    facts: dict[str, str] = {}
    waiting = [Import(name, None) for name in roots]
    while waiting:
        wanted = waiting.pop()
        top = wanted.module.partition(".")[0]
        if top in sys.stdlib_module_names and top != "__main__":
            continue
        if top not in readable and (installed := _installed(top)):
            facts[top] = installed
            continue
        name = _module_name(wanted)
        if name in facts or (_is_plumbing(name) and name not in roots):
            continue
        facts[name], imported = _read(name)
        waiting += imported
    return hashlib.sha256("\n".join(f"{name} {facts[name]}" for name in sorted(facts)).encode()).hexdigest()


def _is_plumbing(name: str) -> bool:
    return _depth(name, _PLUMBING) > _depth(name, _COMPUTES)


def _depth(name: str, packages: Iterable[str]) -> int:
    """Return the length of the longest entry of `packages` that contains a module; 0 if there is none."""
    within = (package for package in packages if name == package or name.startswith(f"{package}."))
    return max(map(len, within), default=0)


def _module_name(wanted: Import) -> str:
    submodule = f"{wanted.module}.{wanted.name}"
    return submodule if wanted.name and _find(submodule) else wanted.module


def _read(name: str) -> tuple[str, tuple[Import, ...]]:
    """Return the id of a module's own code, and its imports."""
    spec = _find(name)
    path = _file(name, spec)
    if path is None:
        loaded = name in sys.modules and (spec is None or spec.submodule_search_locations is None)
        return (_unreadable(name), ()) if loaded else ("absent" if spec is None else "folder", ())
    package = name if spec is not None and spec.submodule_search_locations is not None else name.rpartition(".")[0]
    try:
        return _read_source(path.read_bytes(), package)
    except OSError:
        return _unreadable(name), ()


@lru_cache(maxsize=1024)
def _read_source(content: bytes, package: str) -> tuple[str, tuple[Import, ...]]:
    """Return digest and imports, cached by content: a quick edit may leave the modification time and size unchanged."""
    try:
        syntax = read_syntax(content, package)
    except (SyntaxError, ValueError, RecursionError):  # an extension module, or Python of another version
        return hashlib.sha256(content).hexdigest(), ()
    return hashlib.sha256(syntax.text.encode("utf-8", "surrogatepass")).hexdigest(), syntax.imports


def _unreadable(name: str) -> str:
    _warn_unreadable(name)
    return _THIS_PROCESS


@cache
def _warn_unreadable(name: str) -> None:
    log.warning("cannot read the source of module %s: its results are kept for this process only", name)


def _file(name: str, spec: ModuleSpec | None) -> Path | None:
    """Return the file of a module; for a module without a spec, such as a script, the file that was run."""
    if spec is not None:
        return Path(spec.origin) if spec.has_location and spec.origin else None
    origin = getattr(sys.modules.get(name), "__file__", None)
    return Path(origin) if origin else None


@lru_cache(maxsize=4096)
def _find(name: str) -> ModuleSpec | None:
    """Return the spec of a module. Unlike `importlib.util.find_spec`, this does not import its parent packages."""
    top, *parts = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # a module without a spec, such as a script
        return None
    for index in range(len(parts)):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join([top, *parts[: index + 1]]), spec.submodule_search_locations)
    return spec


@cache
def _installed(top: str) -> str | None:
    """Return name and version of the distribution that installed a top-level package, or None."""
    spec = _find(top)
    if spec is None or (not spec.has_location and spec.submodule_search_locations is None):
        return None
    locations = spec.submodule_search_locations
    folder = Path(next(iter(locations)) if locations else spec.origin or "").parent
    found = [*distributions(name=top, path=[str(folder)])] or _providers(top, folder)
    found = [each for each in found if folder.name in _SITES or each.read_text("RECORD") is not None]
    return ", ".join(sorted({f"{each.name} {each.version}" for each in found})) or None


def _providers(top: str, folder: Path) -> list[Distribution]:
    """Return the distributions in a folder that provide a package under a name other than their own."""
    everything = [*distributions(path=[str(folder)])]
    stated = [each for each in everything if top in (each.read_text("top_level.txt") or "").split()]
    return stated or [each for each in everything if f"\n{top}/" in f"\n{each.read_text('RECORD') or ''}"]
