"""Syntax: differences between files that do the same, and differences that matter."""

import pytest

from frostline.runtime.identity.syntax import Import, read_syntax


def text(source: str) -> str:
    return read_syntax(source.encode(), "package").text


SAME = {
    "comments and blank lines": ("x = 1", "# one\n\nx = 1  # two\n"),
    "formatting": ("f(1, 'a' 'b')", "f(\n    1,\n    'ab',\n)"),
    "docstring of the file": ("x = 1", '"""What it is."""\nx = 1'),
    "docstring of a class": ("class A:\n    x = 1", "class A:\n    '''What.'''\n    x = 1\n    '''Of x.'''"),
    "docstring of a function": ("def f(): pass", "def f():\n    'What.'"),
    "annotations of a function": ("def f(x, *y, z=1): return x", "def f(x: int, *y: int, z: int = 1) -> int: return x"),
    "annotated variables": ("def f():\n    x = 1", "def f():\n    y: int\n    x: int = 1"),
    "imports for types": ("x = 1", "if typing.TYPE_CHECKING:\n    from a import B\nx = 1"),
}
DIFFERENT = {
    "a constant": ("x = 1", "x = 2"),
    "its type": ("x = 1", "x = 1.0"),
    "an operation": ("x = a + b", "x = a - b"),
    "an order": ("f(a, b)", "f(b, a)"),
    "a default": ("def f(x=1): pass", "def f(x=2): pass"),
    "a name": ("from a import b", "from a import c"),
    "what is returned": ("def f(): return None", "def f(): return"),
    "a text that is used": ("x = 'a'", "x = 'b'"),
    "fields of a dataclass": ("class A:\n    x: int", "class A:\n    x: ClassVar[int]"),
    "the other branch": (
        "if TYPE_CHECKING:\n    x = 1\nelse:\n    x = 2",
        "if TYPE_CHECKING:\n    x = 1\nelse:\n    x = 3",
    ),
    "a decorator": ("def f(): pass", "@cache\ndef f(): pass"),
    "async": ("def f(): pass", "async def f(): pass"),
}


@pytest.mark.parametrize("what", SAME)
def test_wording_does_not_count(what: str) -> None:
    one, other = SAME[what]
    assert text(one) == text(other)


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_is_done_counts(what: str) -> None:
    one, other = DIFFERENT[what]
    assert text(one) != text(other)


def test_imports_are_absolute_and_found_within_functions() -> None:
    source = """
import os, a.b as c
from torch import nn
from . import one
from .two import three
from .. import four
from star import *
if TYPE_CHECKING:
    import never
def f():
    from .late import name
"""
    assert {*read_syntax(source.encode(), "pack.sub").imports} == {
        *(Import("os"), Import("a.b"), Import("torch", "nn"), Import("pack.sub", "one")),
        *(Import("pack.sub.two", "three"), Import("pack", "four"), Import("star"), Import("pack.sub.late", "name")),
    }


@pytest.mark.parametrize("source", [b"x = ", b"print 'x'", b"\x7fELF\0", b"\xff\xfe"])
def test_what_is_no_python_is_refused(source: bytes) -> None:
    with pytest.raises((SyntaxError, ValueError)):
        read_syntax(source, "package")
