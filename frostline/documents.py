"""YAML and JSON as files and flags hold them: plain values alone, and no more of them than were written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from frostline.errors import ConfigError, DocumentError

# Beyond all that settings need. Aliases count as often as they are used: ten lines of them can stand for 10^9 values.
_MAX_BYTES = 2**20
_MAX_VALUES = 10_000
_MAX_DEPTH = 50
_TOO_DEEP = f"nested more than {_MAX_DEPTH} levels deep"
# Of a node whose parts are being looked at.
_OPEN = (0, 0)
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_DIGITS = r"[0-9](?:_?[0-9])*"
# What a word without quotes stands for. Numbers as Python has them: in YAML 1.1 `010` is 8, `1:30` is 90, a date is no
# text, and `1e-3` is no number.
_IMPLICIT: Mapping[str, tuple[str, str]] = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": ("|".join(f"{w}|{w.title()}|{w.upper()}" for w in _BOOLEANS), "tTyYoOfFnN"),
    "int": (r"[-+]?(?:0|[1-9](?:_?[0-9])*|0b[01](?:_?[01])*|0o[0-7](?:_?[0-7])*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        rf"[-+]?(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+"
        r"|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
        "-+0123456789.",
    ),
    "merge": ("<<", "<"),
}


def read_named_yaml(path: Path, where: str) -> Any:
    """Read a YAML file that the user named, as `read_yaml` does.

    Args:
        where: what the error calls the file.
    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from error
    except DocumentError as error:
        raise ConfigError(f"{where} cannot be read: it {error}") from error


def read_yaml(path: Path) -> Any:
    """The one document in a file; see `parse_yaml`.

    Raises:
        DocumentError: as there, or the file is larger than settings need.
        OSError: it cannot be read.
    """
    # A pipe of a shell will do as well, so its size says nothing.
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise DocumentError(f"is larger than the {_MAX_BYTES // 2**10} KiB that settings need")
    return _in_words("YAML", lambda: yaml.load(content.decode("utf-8-sig"), _Loader))


def parse_yaml(text: str) -> Any:
    """The one document in `text`; None where it is empty.

    A key that stands twice is an error: plain YAML would silently take the last.

    Raises:
        DocumentError: it is no YAML, holds other than plain values, or more than settings need.
    """
    return _in_words("YAML", lambda: yaml.load(text, _Loader))


def parse_value(text: str) -> Any:
    """What follows the `=` of `section.name=value`: a list, a mapping or a text in quotes, else one word as a whole.

    Raises:
        DocumentError: as `parse_yaml`, or something follows what was closed.
    """
    text = text.strip()
    if text[:1] not in ("[", "{", '"', "'"):
        return _in_words("YAML", lambda: _plain_value(text))
    node = _in_words("YAML", lambda: yaml.compose(text, _Loader))
    if node is not None and node.end_mark.index < len(text):
        raise DocumentError(f"{text[node.end_mark.index :].strip()!r} follows its end")
    return parse_yaml(text)


def parse_json(text: str | bytes) -> Any:
    """The value in `text`.

    Raises:
        DocumentError: it is no JSON, or nested too deeply.
    """
    value = _in_words("JSON", lambda: json.loads(text))
    parts = [value]
    for _ in range(_MAX_DEPTH):
        containers = [part for part in parts if isinstance(part, dict | list)]
        parts = [inner for part in containers for inner in (part.values() if isinstance(part, dict) else part)]
    if parts:
        raise DocumentError(f"is {_TOO_DEEP}")
    return value


def dump_yaml(values: Mapping[str, Any]) -> str:
    """A document that `parse_yaml` reads back, and YAML 1.1 as well."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _in_words(kind: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RecursionError as error:
        raise DocumentError(f"is nested too deeply for {kind}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        what = " ".join(filter(None, (error.context, error.problem)))
        raise DocumentError(f"is not valid {kind}: {where}{what}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise DocumentError(f"is not valid {kind}: {' '.join(str(error).split())}") from error


def finite_values(value: Any) -> Any:
    """Return plain values as JSON has them: a number that is not finite becomes None, a tuple a list."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: finite_values(item) for name, item in value.items()}
        case list() | tuple():
            return [finite_values(item) for item in value]
    return value


class _Loader(yaml.SafeLoader):
    """Plain values; duplicate keys, deep nesting and multiplying aliases refused."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _Refused(_TOO_DEEP, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _Refused(f"{key.value} stands twice", node.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _extent(node, {})
        return node


class _Refused(yaml.MarkedYAMLError):
    """Well-formed, but not taken."""

    def __init__(self, problem: str, mark: yaml.Mark | None) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Dumper(yaml.SafeDumper):
    """Text that is read as text by both rules, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values `node` stands for, and how deep they are nested, aliases written out; raises if it is too much.

    Args:
        known: what was found of other nodes, by their `id`.
    """
    if id(node) not in known:
        known[id(node)] = _OPEN
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        extents = [_extent(part, known) for part in parts]
        counts, depths = zip(*extents, strict=True) if extents else ((), ())
        known[id(node)] = 1 + sum(counts), 1 + max(depths, default=0)
    count, depth = known[id(node)]
    if (count, depth) == _OPEN:
        raise _Refused("an alias stands for what it is part of", node.start_mark)
    if count > _MAX_VALUES:
        raise _Refused(f"more than {_MAX_VALUES} values, aliases written out", node.start_mark)
    if depth > _MAX_DEPTH:
        raise _Refused(_TOO_DEEP, node.start_mark)
    return count, depth


def _plain_value(text: str) -> Any:
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan")
    try:
        return float(text) if node.tag.endswith("float") else int(text, 0)
    except ValueError:
        raise _Refused(f"{node.value[:40]!r} is no number", node.start_mark) from None


def _construct_bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    word = loader.construct_scalar(node).lower()
    if word not in _BOOLEANS:
        raise _Refused(f"{node.value[:40]!r} is neither true nor false", node.start_mark)
    return _BOOLEANS[word]


def _prepare() -> None:
    _Loader.yaml_implicit_resolvers, _Loader.yaml_constructors = {}, {}
    for kind, (pattern, first) in _IMPLICIT.items():
        tag = f"tag:yaml.org,2002:{kind}"
        starts = [character.strip("\0") for character in first]
        _Loader.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), starts)
        _Dumper.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), starts)
    safe = yaml.SafeLoader.yaml_constructors
    for kind in ("null", "str", "seq", "map"):
        _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", safe[f"tag:yaml.org,2002:{kind}"])
    for kind in ("int", "float"):
        _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _construct_number)
    _Loader.add_constructor("tag:yaml.org,2002:bool", _construct_bool)
    _Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)  # type: ignore[arg-type]


_prepare()
