"""A run that was killed and resumed ends bit for bit like an undisturbed run."""

import json
from pathlib import Path
from typing import Any

import pytest
from forked import run_python

SCRIPT = Path(__file__).parents[2] / "killed_runs.py"
# Values that depend on the clock.
TIMES = ("seconds", "stages", "peak_memory_gb")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """Return an undisturbed run, one that was killed ten times, and a line about each kill."""
    out = tmp_path_factory.mktemp("runs")
    done = run_python(str(SCRIPT), str(out), "0", timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "whole", out / "killed", done.stdout.splitlines()


def lines(path: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


def test_it_was_killed_in_the_middle(runs: tuple[Path, Path, list[str]]) -> None:
    codes = [line.split()[1] for line in runs[2]]
    assert len(codes) == 10
    assert codes.count("143") >= 3
    assert codes.count("-9") >= 3


@pytest.mark.parametrize(
    "name",
    [
        "adapter/adapter_model.safetensors",
        "checkpoint-24/adapter_model.safetensors",
        "checkpoint-24/optimizer.safetensors",
        "checkpoint-24/random-0.safetensors",
        "checkpoint-24/state.json",
        "validation.jsonl",
    ],
)
def test_what_a_killed_run_leaves_is_equal_to_the_bit(name: str, runs: tuple[Path, Path, list[str]]) -> None:
    whole, killed, _ = runs
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_metrics_have_each_step_once_and_equal(runs: tuple[Path, Path, list[str]]) -> None:
    whole, killed, _ = runs
    assert [line["step"] for line in lines(killed / "metrics.jsonl")] == list(range(1, 25))
    assert lines(killed / "metrics.jsonl") == lines(whole / "metrics.jsonl")


def test_no_debris_is_left(runs: tuple[Path, Path, list[str]]) -> None:
    _, killed, _ = runs
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in killed.glob("*checkpoint*"))
    # As many as `save_total_limit`. SIGTERM saves at the current step, so the other steps depend on the time of the
    # kill.
    assert len(steps) == 3
    assert steps[-1] == 24
    assert list(killed.glob(".*partial")) == []
