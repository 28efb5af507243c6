"""Python source as what it does: without comments, docstrings, annotations and formatting."""

from __future__ import annotations

import ast
from typing import NamedTuple

# How a node was spelled, or follows from where it is; some versions of Python have them and others have not.
_SPELLING = frozenset({"ctx", "kind", "type_comment", "type_ignores", "returns"})


class Import(NamedTuple):
    """What an import statement asks for: `module`, or `name` of `module`, which may be a module, too."""

    module: str
    name: str | None = None


class Syntax(NamedTuple):
    """What a file does, in one spelling for all files that do the same; and what it imports, within functions too."""

    text: str
    imports: tuple[Import, ...]


def read_syntax(source: bytes, package: str) -> Syntax:
    """Return the syntax of a file, without what only type checkers run.

    Annotations in the body of a class are kept: dataclasses and settings read them.

    Args:
        package: that relative imports start from.
    Raises:
        SyntaxError, ValueError: it is no Python, or of a version that this one cannot read.
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
    """Return whether it is `pass`, a string that stands alone, as docstrings do, or for type checkers only."""
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
