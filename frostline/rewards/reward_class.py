"""Find the class that an entry of `rewards` names, with or without importing it.

Importing a module runs it, which must not happen when someone only inspects another user's settings.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from frostline.errors import ConfigError

_SOURCE = ".py"


def import_reward(path: str, where: str) -> type[Any]:
    """Import the module and return the class.

    Args:
        path: `package.module:Class`.
        where: the entry of the settings, for error messages.
    Raises:
        ConfigError: there is no such class.
    """
    module_name, name = _split(path, where)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{where}.type {path}: {module_name} cannot be imported: {error}") from error
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        raise ConfigError(f"{where}.type {path}: {module_name} has no class {name!r}")
    return found


def look_for_reward(path: str, where: str) -> None:
    """Search the source of the module for the class, without running the module or its parent packages.

    If the name may be defined by other means than `class`, or the module has no source, the check is left to the run.

    Raises:
        ConfigError: there is no such module or class.
    """
    module_name, name = _split(path, where)
    spec = _find_module(module_name)
    if spec is None:
        raise ConfigError(f"{where}.type {path}: {module_name} cannot be imported: there is no such module")
    if spec.origin is None:  # a folder without `__init__.py`
        raise ConfigError(f"{where}.type {path}: {module_name} has no class {name!r}")
    if not spec.origin.endswith(_SOURCE):
        return
    try:
        tree = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{where}.type {path}: {module_name} cannot be imported: {error}") from error
    names = {*_names(tree)}
    if name not in names and not names & {"*", "__getattr__"}:
        raise ConfigError(f"{where}.type {path}: {module_name} has no class {name!r}")


def _split(path: str, where: str) -> tuple[str, str]:
    module_name, colon, name = path.partition(":")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(f"{where}.type {path!r}: must be package.module:Class")
    return module_name, name


def _find_module(name: str) -> ModuleSpec | None:
    """Return the spec like `importlib.util.find_spec`, but without importing parent packages."""
    package, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # the program itself
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    return spec


def _names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a module may define: classes, imports, assignments; `*` for all names of another module."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.ClassDef():
                yield node.name
            case ast.FunctionDef(name="__getattr__"):
                yield node.name
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                pass
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case _:
                yield from _names(node)
