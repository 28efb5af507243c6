"""Tables at every width: the columns that identify a row are there, nothing is cut, and piped output is complete."""

import io

import pytest
from rich.text import Text

from frostline.terminal import Terminal
from frostline.terminal.tables import Column, FittedTable

KEYS = [f"{number:016x}" for number in (11, 12, 13)]


def printed(table: FittedTable, width: int | None) -> list[str]:
    file = io.StringIO()
    Terminal(file=file, width=width).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def engines() -> FittedTable:
    table = FittedTable(
        Column("model", drop=1),
        Column("stage"),
        Column("key"),
        Column("MB", right=True, drop=2),
        Column("created", drop=3),
        Column("note", wraps=True, drop=4),
    )
    for key, size in zip(KEYS, ("1.5", "20.0", "3.5"), strict=True):
        table.add_row(
            "Wan2.2-I2V-A14B", "denoiser_high_noise", key, size, f"2026-01-{key[-2:]}", Text("verified " * 4, "green")
        )
    return table


@pytest.mark.parametrize("width", [30, 40, 50, 60, 80, 100, 120, None])
def test_no_cell_that_stays_is_cut_at_any_width(width: int | None) -> None:
    lines = printed(engines(), width)
    assert all(len(line) <= (width or 10_000) for line in lines)
    for key in KEYS:
        assert sum(key in line for line in lines) == 1
    assert "…" not in "\n".join(lines)


def test_what_is_piped_has_every_column_in_one_line_a_row() -> None:
    head, *rows = printed(engines(), None)
    assert head.split() == ["model", "stage", "key", "MB", "created", "note"]
    assert len(rows) == 3 and all(row.startswith("Wan2.2-I2V-A14B  denoiser_high_noise") for row in rows)
    assert all(row.endswith("verified verified verified verified") for row in rows)


def test_columns_of_one_value_are_named_once_before_others_are_dropped() -> None:
    lines = printed(engines(), 60)
    assert lines[0].split() == ["stage", "key", "MB", "created"]
    assert " ".join(lines[4:]) == "all: model Wan2.2-I2V-A14B, note verified verified verified verified"
    lines = printed(engines(), 50)
    assert lines[0].split() == ["stage", "key", "MB"]
    assert " ".join(lines).endswith("not shown because the terminal is too narrow: created")


def test_a_row_that_fits_in_no_line_becomes_a_block() -> None:
    lines = printed(engines(), 30)
    assert lines[:3] == ["model: Wan2.2-I2V-A14B", "stage: denoiser_high_noise", f"key: {KEYS[0]}"]
    assert lines.count("") == 3


def test_paths_lose_what_they_share_where_there_is_no_room() -> None:
    table = FittedTable(Column("video", path=True), Column("score", right=True))
    folder = "/data/projects/faces/validation/step-000040/"
    for number in range(3):
        table.add_row(f"{folder}clip-{number}-of-a-long-name.mp4", f"0.{number}")
    assert printed(table, None)[1].startswith(folder), "another program gets whole paths"
    assert printed(table, 60) == [
        f"video: in {folder}",
        "video                      score",
        "clip-0-of-a-long-name.mp4    0.0",
        "clip-1-of-a-long-name.mp4    0.1",
        "clip-2-of-a-long-name.mp4    0.2",
    ]
    narrow = "".join(printed(table, 32)).replace(" ", "")
    assert narrow.count("clip-") == 3 and narrow.count("0.1") == 1


@pytest.mark.parametrize(
    ("paths", "shared"),
    [
        (["/a/b/1.mp4", "/a/b/2.mp4"], "/a/b/"),
        (["/a/bc/1.mp4", "/a/bd/2.mp4"], "/a/"),
        (["1.mp4", "12.mp4"], ""),
        (["/a/b.mp4"], ""),
        (["/a/b.mp4", "/a/b.mp4"], "/a/"),
    ],
)
def test_the_shared_part_of_paths_is_a_whole_folder(paths: list[str], shared: str) -> None:
    table = FittedTable(Column("video", path=True))
    for path in paths:
        table.add_row(path + " " * 30)
    lines = printed(table, 24)
    assert (f"video: in {shared}" in lines) is bool(shared)


def test_names_and_styles_are_text() -> None:
    table = FittedTable(Column("a [bold]"), title="of [x]")
    table.add_row("[red]\x1b[2J\nb")
    assert printed(table, 80) == ["of [x]", "a [bold]", r"[red]\x1b[2J\nb"]
    with pytest.raises(ValueError, match="2 cells for 1 columns"):
        table.add_row("1", "2")


def test_no_row_is_a_heading_alone() -> None:
    assert printed(FittedTable(Column("stage"), Column("key")), 80) == ["stage  key"]
