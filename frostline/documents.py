"""Read YAML and JSON documents that contain plain values only, with limits on nesting and size."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from frostline.errors import ConfigError, DocumentError

# Well above what settings need. Each use of an alias counts: ten lines of aliases can expand to 10^9 values.
_MAX_BYTES = 2**20
_MAX_VALUES = 10_000
_MAX_DEPTH = 50
_TOO_DEEP = f"nested more than {_MAX_DEPTH} levels deep"
# Marks a node whose children are being processed.
_OPEN = (0, 0)
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_DIGITS = r"[0-9](?:_?[0-9])*"
# Types of unquoted words. Numbers use Python syntax: in YAML 1.1, `010` is 8, `1:30` is 90, dates are not text, and
# `1e-3` is not a number.
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
    """Read a YAML file that the user named; see `read_yaml`.

    Args:
        where: name of the file in error messages.
    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from error
    except DocumentError as error:
        raise ConfigError(f"{where} cannot be read: it {error}") from error


def read_yaml(path: Path) -> Any:
    """Read the only document in a file; see `parse_yaml`.

    Raises:
        DocumentError: the document is invalid, or the file is too large.
        OSError: the file cannot be read.
    """
    # The file may be a shell pipe, whose size is unknown.
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise DocumentError(f"is larger than {_MAX_BYTES // 2**10} KiB, the limit for settings")
    return _in_words("YAML", lambda: yaml.load(content.decode("utf-8-sig"), _Loader))


def parse_yaml(text: str) -> Any:
    """Parse the only document in `text`; return None if it is empty.

    Duplicate keys are an error: YAML parsers usually keep the last one silently.

    Raises:
        DocumentError: the text is not valid YAML, contains values that are not plain, or exceeds the size limits.
    """
    return _in_words("YAML", lambda: yaml.load(text, _Loader))


def parse_value(text: str) -> Any:
    """Parse the value in `section.name=value`: a list, a mapping or quoted text; anything else is one unquoted word.

    Raises:
        DocumentError: see `parse_yaml`; or there is text after the closing bracket or quote.
    """
    text = text.strip()
    if text[:1] not in ("[", "{", '"', "'"):
        return _in_words("YAML", lambda: _plain_value(text))
    node = _in_words("YAML", lambda: yaml.compose(text, _Loader))
    if node is not None and node.end_mark.index < len(text):
        raise DocumentError(f"is followed by unexpected text: {text[node.end_mark.index :].strip()!r}")
    return parse_yaml(text)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text.

    Raises:
        DocumentError: the text is not valid JSON, or is nested too deeply.
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
    """Return a YAML document that `parse_yaml` and YAML 1.1 parsers read with the same result."""
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
    """Convert plain values to JSON values: non-finite numbers become None, tuples become lists."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: finite_values(item) for name, item in value.items()}
        case list() | tuple():
            return [finite_values(item) for item in value]
    return value


class _Loader(yaml.SafeLoader):
    """Loader of plain values; rejects duplicate keys, deep nesting and excessive alias expansion."""

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
                raise _Refused(f"duplicate key {key.value}", node.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _extent(node, {})
        return node


class _Refused(yaml.MarkedYAMLError):
    """A document that is valid YAML but rejected here."""

    def __init__(self, problem: str, mark: yaml.Mark | None) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which YAML 1.1 or `parse_yaml` would read as another type; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of values in `node` and their nesting depth, with aliases expanded; raise if a limit is
    exceeded.

    Args:
        known: results of other nodes, by `id`.
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
        raise _Refused("an alias refers to a node that contains it", node.start_mark)
    if count > _MAX_VALUES:
        raise _Refused(f"more than {_MAX_VALUES} values after alias expansion", node.start_mark)
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
        raise _Refused(f"{node.value[:40]!r} is not a number", node.start_mark) from None


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
