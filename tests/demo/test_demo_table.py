"""The last lines of the demo: each gain over the frames that have a score in both validations, and over all frames."""

from pathlib import Path
from typing import Any

import pytest

from frostline.demo.table import print_summary


def summary(**paired: Any) -> dict[str, Any]:
    numbers = {
        f"{name}_{when}": 0.5 for name in ("face_score", "detection_rate", "psnr") for when in ("before", "after")
    }
    numbers |= {f"{name}_{when}": 0.25 for name in paired for when in ("before", "after")}
    times = dict.fromkeys(("step_ms_cached", "step_ms_uncached", "step_ms_torch", "seconds"), 1.0)
    return {"starts": 20, "paired": paired, "verdict": "gains agree.", **numbers, **times}


def test_hidden_faces_count_as_zero_beside_the_gain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    change = {"starts": 20, "starts_up": 16, "gain": 0.0856, "frames": 150, "gain_missing_zero": -0.0123}
    whole = {"starts": 20, "starts_up": 3, "gain": -0.25}
    print_summary(summary(face_score=change, judge_motion=whole), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert (
        "face score up in 16 of 20 samples, by +0.086 in the 150 frames that were scored both times, "
        "-0.012 in all frames, with 0 for frames without a score" in lines
    )
    # A score of whole clips has no missing frames.
    assert "judge motion up in 3 of 20 samples, by -0.250" in lines
