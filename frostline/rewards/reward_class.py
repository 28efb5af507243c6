"""The class that an entry of `rewards` names: imported, or only looked for.

To import a module is to run it, which whoever looks at the settings of somebody else does not ask for.
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
    """The class, its module imported.

    Args:
        path: `package.module:Class`.
        where: the entry of the settings, to be named in errors.
    Raises:
        ConfigError: there is none.
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
    """Look in the source of the module for the class, running nothing of it nor of the packages around it.

    What a module has under that name by other means than `class`, or a module without source, is left to the run.

    Raises:
        ConfigError: the module is not there or has no such name.
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
    """As `importlib.util.find_spec`, which would import the packages that the module is in."""
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
    """What a module may hold under a name: its classes, and whatever it imports or assigns; `*` for all of another."""
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
