"""Normalise Python source: remove comments, docstrings, annotations and formatting."""

from __future__ import annotations

import ast
from typing import NamedTuple

# Fields of nodes that do not affect execution: spelling and types; not all versions of Python have them.
_SPELLING = frozenset({"ctx", "kind", "type_comment", "type_ignores", "returns"})


class Import(NamedTuple):
    """The target of an import statement: `module`, or `name` of `module`, which may itself be a module."""

    module: str
    name: str | None = None


class Syntax(NamedTuple):
    """The normalised code of a file, equal for files that do the same, and all its imports, also in functions."""

    text: str
    imports: tuple[Import, ...]


def read_syntax(source: bytes, package: str) -> Syntax:
    """Return the normalised code of a file, without blocks for type checkers only.

    Annotations in the body of a class are kept, because dataclasses and settings read them.

    Args:
        package: the base of relative imports.
    Raises:
        SyntaxError, ValueError: the file is not valid Python, or needs another Python version.
    """
    writer = _Writer(package)
    writer.write(ast.parse(source))
    return Syntax("".join(writer.words), tuple(writer.imports))


class _Writer:
    def __init__(self, package: str) -> None:
        self.words: list[str] = []
        self.imports: list[Import] = []
        self._package = package.split(".")

    def write(self, node: ast.AST, in_class: bool = False) -> None:
        if isinstance(node, ast.AnnAssign) and node.value is not None and not in_class:
            node = ast.Assign([node.target], node.value)
        elif isinstance(node, ast.Import):
            self.imports += [Import(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = self._absolute(node)
            self.imports += [Import(module, None if alias.name == "*" else alias.name) for alias in node.names]
        self.words.append(f"({type(node).__name__}")
        for field in node._fields:
            value = getattr(node, field, None)
            if value is None or value == [] or field in _SPELLING or self._is_for_type_checkers(node, field):
                continue
            self.words.append(f" {field}=")
            self._write_value(value, field == "body" and isinstance(node, ast.ClassDef))
        self.words.append(")")

    def _write_value(self, value: object, in_class: bool) -> None:
        if isinstance(value, ast.AST):
            self.write(value, in_class)
        elif isinstance(value, list):
            self.words.append("[")
            for item in value:
                if not _does_nothing(item, in_class):
                    self._write_value(item, in_class)
                    self.words.append(",")
            self.words.append("]")
        else:
            self.words.append(repr(value))

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parent = self._package[: len(self._package) - node.level + 1]
        return ".".join([*parent, *([node.module] if node.module else [])])

    @staticmethod
    def _is_for_type_checkers(node: ast.AST, field: str) -> bool:
        if isinstance(node, ast.arg):
            return field == "annotation"
        return isinstance(node, ast.If) and field == "body" and _is_type_checking(node)


def _does_nothing(node: object, in_class: bool) -> bool:
    """Return whether a statement is `pass`, a string such as a docstring, or for type checkers only."""
    match node:
        case ast.Pass() | ast.Expr(value=ast.Constant(value=str())):
            return True
        case ast.AnnAssign(value=None):
            return not in_class
        case ast.If(orelse=[]):
            return _is_type_checking(node)
    return False


def _is_type_checking(node: ast.If) -> bool:
    name = getattr(node.test, "attr", None) or getattr(node.test, "id", None)
    return name == "TYPE_CHECKING"
