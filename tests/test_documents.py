"""YAML and JSON: the values of words, limits against large documents, and round trips."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.documents import dump_yaml, parse_json, parse_value, parse_yaml, read_yaml
from frostline.errors import DocumentError

# The value of each word. YAML 1.1 reads the second group as the text 0.001, 8, 90, a date and an error.
WORDS: dict[str, Any] = {
    **{
        "1": 1,
        "-3": -3,
        "+7": 7,
        "0": 0,
        "1_000": 1000,
        "0x1F": 31,
        "0o10": 8,
        "0b11": 3,
        "1.5": 1.5,
        ".5": 0.5,
        "5.": 5.0,
    },
    **{
        "1e-3": 1e-3,
        "010": "010",
        "1:30": "1:30",
        "2024-01-01": "2024-01-01",
        "0b_": "0b_",
        "2024-13-45": "2024-13-45",
    },
    **{
        "yes": True,
        "No": False,
        "ON": True,
        "off": False,
        "true": True,
        "~": None,
        "null": None,
        "": None,
        "none": "none",
    },
    **{".inf": math.inf, "-.INF": -math.inf, "=": "=", "1__0": "1__0", "1_": "1_", ".": ".", "e5": "e5"},
}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_stands_for_one_value_in_files_and_flags(word: str) -> None:
    expected = WORDS[word]
    for value in (parse_yaml(f"key: {word}")["key"], parse_value(word)):
        assert value == expected and type(value) is type(expected)
    assert math.isnan(parse_value(".nan"))


@pytest.mark.parametrize(
    "text",
    [
        "runs/exp #3",
        "#3",
        "a: b",
        "*a",
        "&a",
        "!!int 3",
        "- a",
        "---",
        "%a",
        "@a",
        "`a",
        "|",
        ">",
        "a\nb",
        "? a",
        "a, b",
    ],
)
def test_what_follows_the_equals_sign_is_taken_whole(text: str) -> None:
    assert parse_value(text) == text
    assert parse_value(f" {text} ") == text


def test_what_follows_the_equals_sign_may_be_a_list_a_mapping_or_in_quotes() -> None:
    assert parse_value("[q, k]") == ["q", "k"]
    assert parse_value("{vae: torch, 'a #b': 1e-3}") == {"vae": "torch", "a #b": 1e-3}
    assert parse_value('"runs/exp #3"') == "runs/exp #3"
    for text in ("[q] # a note", '"runs/exp" #3', "'a' b", "[q", "{a: 1, a: 2}"):
        with pytest.raises(DocumentError):
            parse_value(text)


def _nested(width: int, depth: int, first: str, rest: str) -> str:
    """Return `depth` lines, each of which has `width` aliases of the line before: `width ** (depth - 1)` values."""
    lines = [f"a0: &a0 {first}"]
    for i in range(1, depth):
        lines.append(f"a{i}: &a{i} {rest.replace('ALIASES', ', '.join([f'*a{i - 1}'] * width))}")
    return "\n".join(lines)


HOSTILE = {
    "aliases of aliases": (_nested(10, 8, "[x]", "[ALIASES]"), "more than 10000 values after alias expansion"),
    "merges of merges": (_nested(10, 8, "{x: 1}", "{<<: [ALIASES]}"), "more than 10000 values"),
    "a chain of aliases": (_nested(1, 400, "[x]", "[ALIASES]"), "nested more than 50 levels deep"),
    "a list of itself": ("a: &a [*a]", "an alias refers to a node that contains it"),
    "a mapping merged into itself": ("a: &a {<<: *a}", "an alias refers to a node that contains it"),
    "deep": ("[" * 100_000, "nested more than 50 levels deep"),
    "deep and whole": ("[" * 60 + "]" * 60, "nested more than 50 levels deep"),
    "deep in lines": ("- " * 10_000 + "a", "nested more than 50 levels deep"),
    "many": ("- a\n" * 10_001, "more than 10000 values"),
    "twice": ("a: 1\na: 2", "line 1, column 1: duplicate key a"),
    "twice within": ("b:\n  c: 1\n  c: 2", "line 2, column 3: duplicate key c"),
    "an object": ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
    "a date with its tag": ("!!timestamp 2024-01-01", "could not determine a constructor"),
    "bytes": ("!!binary aGk=", "could not determine a constructor"),
    "a set": ("!!set {a}", "could not determine a constructor"),
    "a number that is none": ("!!int abc", "'abc' is not a number"),
    "a number without digits": ("!!float ''", "'' is not a number"),
    "a number too long": ("1" * 5000, "is not a number"),
    "a switch that is none": ("!!bool maybe", "'maybe' is neither true nor false"),
    "a list as a key": ("? [a]\n: b", "unhashable key"),
    "an alias of nothing": ("a: *x", "undefined alias"),
    "two documents": ("--- 1\n--- 2", "another document"),
    "a control character": ("a\0b", "special characters are not allowed"),
    "a surrogate": ("a: \ud800", "special characters are not allowed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_plain_document_is_refused_in_words(name: str) -> None:
    text, said = HOSTILE[name]
    with pytest.raises(DocumentError) as caught:
        parse_yaml(text)
    assert str(caught.value).startswith("is not valid YAML: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_anchors_and_merges_of_a_settings_file_are_read() -> None:
    text = (
        "data: &size {num_frames: 81, stride: 1}\nb: {<<: *size, stride: 2}\nc: &c {<<: *size}\nd: {<<: *c, x: *size}"
    )
    size = {"num_frames": 81, "stride": 1}
    expected = {"data": size, "b": {**size, "stride": 2}, "c": size, "d": {**size, "x": size}}
    assert parse_yaml(text) == expected == yaml.safe_load(text)


def test_a_file_is_no_larger_than_settings_need(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("\ufeffa: ä")
    assert read_yaml(path) == {"a": "ä"}
    path.write_bytes(b"\xff")
    with pytest.raises(DocumentError, match="is not valid YAML: 'utf-8' codec"):
        read_yaml(path)
    with pytest.raises(DocumentError, match="is larger than 1024 KiB, the limit for settings"):
        read_yaml(Path("/dev/zero"))
    path.write_text("# nothing\n")
    assert read_yaml(path) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON: "),
        (b"\xff", "is not valid JSON: "),
        ("1" * 5000, "is not valid JSON: "),
        ("[" * 100_000, "is nested too deeply"),
        ("[" * 60 + "]" * 60, "is nested more than 50 levels deep"),
        ('{"a":' * 60 + "1" + "}" * 60, "is nested more than 50 levels deep"),
    ],
)
def test_json_that_cannot_be_read_is_refused_in_words(text: str | bytes, said: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_json(text)
    assert str(caught.value).startswith(said)


def test_json_is_read() -> None:
    assert parse_json(b'{"a": [1, 2.5, "x", null, true]}') == {"a": [1, 2.5, "x", None, True]}
    assert parse_json("[" * 40 + "]" * 40) == parse_yaml("[" * 40 + "]" * 40)


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"])) | st.sampled_from(sorted(WORDS))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(TEXT, VALUES, max_size=3))
def test_what_is_written_reads_back_here_and_elsewhere(values: dict[str, Any]) -> None:
    text = dump_yaml(values)
    assert repr(parse_yaml(text)) == repr(values) == repr(yaml.safe_load(text))


def test_what_is_written_has_no_aliases() -> None:
    shared = ["q", "k"]
    assert "&" not in dump_yaml({"a": shared, "b": shared})
