"""A hundred kills while checkpoints, rotation and reports are written: nothing is lost, and nothing is left over."""

from pathlib import Path

import pytest
from folders import content
from forked import run_python

SCRIPT = Path(__file__).parents[2] / "killed_writes.py"


@pytest.mark.parametrize("seed", [0])
def test_what_is_killed_while_it_writes_ends_as_if_it_had_not_been(seed: int, tmp_path: Path) -> None:
    done = run_python(str(SCRIPT), str(tmp_path), str(seed))
    assert done.returncode == 0, done.stderr[-3000:]
    steps, *ends = map(int, done.stdout.split())
    assert len(ends) == 100
    killed, whole = content(tmp_path / "killed"), content(tmp_path / "whole")
    # The page names the folder of its run.
    for found in (killed, whole):
        assert found.pop("report.html")
    assert killed == whole
    assert {f"checkpoint-{steps}", f"checkpoint-{steps - 1}"} < whole.keys()
    assert sorted(name for name in whole if "/" not in name and name.startswith(".")) == [".lock"]
