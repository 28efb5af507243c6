"""The lines of the files in a run folder: complete for any sample id, and removed after the step of a checkpoint."""

import json
from pathlib import Path

from frostline.train.loop.run_dir import JsonLines, read_lines

# Characters at which `str.splitlines` ends a line; only the first two end a line of a file. The last one is Python's
# spelling of a byte in a file name that is not UTF-8.
ENDS = ("\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\udce9")


def test_a_sample_may_be_called_anything(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    lines = [{"step": step, "sample_id": [f"clip{end}{step}.mp4"]} for step, end in enumerate(ENDS, 1)]
    for line in lines:
        file.append(line)
    assert read_lines(file.path) == lines
    file.keep_until(9)
    assert read_lines(file.path) == lines[:9]


def test_a_piece_of_a_line_is_left_out(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "loss": float("nan")})
    with file.path.open("a") as writer:
        writer.write(json.dumps({"step": 2})[:-3])
    assert read_lines(file.path) == [{"step": 1, "loss": None}]
    assert read_lines(tmp_path / "absent.jsonl") == []


def test_a_hostile_line_is_left_out(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.path.write_text("[" * 100_000 + "\n" + '{"a":' * 60 + "1" + "}" * 60 + '\n{"step": "x"}\n{"step": 1}\n[]\n')
    assert read_lines(file.path) == [{"step": "x"}, {"step": 1}]
    file.keep_until(9)
    assert read_lines(file.path) == [{"step": 1}]
