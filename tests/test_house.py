"""Rules of the code base: allowed imports, sizes of folders and files, and completeness of the tests."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The top-level folders, lowest first. A folder may import the leaves, and those before it except those in `BESIDE`.
ROOMS = ("models", "runtime", "stages", "rewards", "export", "score", "train", "cluster", "demo", "cli")
BESIDE = {"score": {"train"}, "train": {"score"}, "report": {*ROOMS}}
LEAVES = {
    *("errors", "config", "experts", "documents", "video", "paths", "atomic_io", "package_info", "progress"),
    *("escaping", "terminal", "csvfile", "allocation", "recipes", "deferred_init"),
}
# Within a top-level folder: the first may not import the second.
CLOSED = (
    ("train.memory", "train.step"),
    ("train.memory", "train.loop"),
    ("train.data", "train.step"),
    ("train.data", "train.loop"),
    ("train.step", "train.loop"),
    ("train.step", "train.judging"),
    ("train.judging", "train.loop"),
    ("train.judging", "train.precompute"),
    ("train.loop", "train.precompute"),
    ("train.step", "train.precompute"),
    ("train.memory", "train.precompute"),
    ("models.wan", "models.checkpoints"),
    ("models.wan", "models.lora"),
    ("models.checkpoints", "models.lora"),
    ("models.onnx", "models.faces"),
    ("runtime.identity", "runtime.planning"),
    ("runtime.engines", "runtime.planning"),
)
MOST_FILES, MOST_LINES = 16, 400


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of frostline that a file imports, also within functions, without `frostline.`."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [
                ".".join(
                    [*inside[: len(inside) - node.level], node.module or ""] if node.level else [node.module or ""]
                )
            ]
            if names == ["frostline"]:
                names = [f"frostline.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("frostline.") for name in names if name.startswith("frostline."))


def imports(path: Path) -> Iterator[str]:
    """Yield the top-level folders and leaves that a file imports."""
    yield from (name.split(".")[0] for name in imported(path))


def test_imports_point_one_way() -> None:
    wrong = []
    for path in sorted((ROOT / "frostline").rglob("*.py")):
        room = path.relative_to(ROOT / "frostline").parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        if room in LEAVES:
            forbidden = {*ROOMS, "report"}
        elif room == "report":
            forbidden = {*ROOMS}
        else:
            forbidden = {*ROOMS[ROOMS.index(room) + 1 :]} | BESIDE.get(room, set())
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in imports(path) if name in forbidden]
    assert wrong == []


@pytest.mark.parametrize(("lower", "upper"), CLOSED)
def test_imports_within_a_room_point_one_way(lower: str, upper: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "frostline" / lower.replace(".", "/")).rglob("*.py")
        for name in imported(path)
        if f"{name}.".startswith(f"{upper}.")
    ]
    assert wrong == []


def test_training_knows_no_model_family() -> None:
    """A family is a folder in `stages/`; training uses `VideoModel` and `Family` only."""
    named = re.compile("Wan|diffsynth|TEMPORAL_STRIDE|models[.]wan|models[.]checkpoints|stages[.]wan")
    files = set((ROOT / "frostline" / "train").rglob("*.py")) - {ROOT / "frostline/train/__init__.py"}
    assert [str(path.relative_to(ROOT)) for path in sorted(files) if named.search(path.read_text())] == []


def test_no_folder_and_no_file_is_too_large() -> None:
    folders = [path for path in (ROOT / "frostline").rglob("*") if path.is_dir() and path.name != "__pycache__"]
    assert [
        f"{folder.relative_to(ROOT)}: {count} files"
        for folder in (ROOT / "frostline", *folders)
        if (count := sum(path.is_file() for path in folder.iterdir())) > MOST_FILES
    ] == []
    assert [
        f"{path.relative_to(ROOT)}: {count} lines"
        for path in (ROOT / "frostline").rglob("*.py")
        if (count := len(path.read_text().splitlines())) > MOST_LINES
    ] == []


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports test files by their names without the folder, so it refuses two files with the same name."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted({*names})


def test_make_test_leaves_no_test_out() -> None:
    parts = re.search(r"^TEST_PARTS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert parts is not None
    covered = {path for pattern in re.split("[ ,]", parts[1]) for path in ROOT.glob(pattern)}
    files = (ROOT / "tests").rglob("test_*.py")
    assert [file for file in files if file not in covered and not covered & {*file.parents}] == []


@pytest.mark.parametrize("file", ["slow.txt", "exhaustive.txt"])
def test_listed_tests_are_there(file: str) -> None:
    listed = (ROOT / "tests" / file).read_text().splitlines()
    assert listed == sorted({*listed})
    for path, _, name in (line.partition("[")[0].partition("::") for line in listed):
        assert not name or f"\ndef {name}(" in (ROOT / path).read_text(), name
        assert (ROOT / path).is_file(), path
