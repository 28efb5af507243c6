"""The verdict from the lines of validation.jsonl: gains agree, or the reward rises while a judge falls."""

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frostline.rewards.paired import PairedGain
from frostline.train.judging.verdict import change_of, direction, verdict, with_verdict

Starts = list[float | None]
FEW = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
BEFORE: Starts = [0.5, 0.55, 0.6, 0.52]
UP: Starts = [0.6, 0.66, 0.69, 0.61]
DOWN: Starts = [0.4, 0.46, 0.49, 0.41]
BOTH_WAYS: Starts = [0.6, 0.45, 0.7, 0.42]
MINUS = "\N{MINUS SIGN}"
NONE: Starts = [None, math.nan, None, None]


def line(step: int, reward: Starts, judges: dict[str, Starts] | None = None, **more: Any) -> dict[str, Any]:
    judges = judges or {}
    return {
        "step": step,
        "rewards": ["face_score"],
        "judges": [*judges],
        "starts": {"face_score": reward, **judges, "psnr": [20.0] * len(reward)},
        **more,
    }


def after(reward: Starts, **judges: Starts) -> list[dict[str, Any]]:
    before = {name: BEFORE[: len(values)] for name, values in judges.items()}
    return [line(0, BEFORE[: len(reward)], before), line(40, reward, judges)]


@pytest.mark.parametrize(
    ("lines", "kind", "said"),
    [
        (after(UP, judge_a=UP), "agree", ["gains agree: face_score rises (+0.0975", "judge_a rises", "4 samples"]),
        (after(UP, judge_a=DOWN), "hacking", ["reward hacking?", f"judge_a falls since step 40 ({MINUS}0.103"]),
        (after(UP, judge_a=UP, judge_b=DOWN), "hacking", ["judge_b falls since step 40"]),
        (after(UP, judge_a=UP, judge_b=BOTH_WAYS), "unmoved", ["judge_a rises", "judge_b does not change"]),
        (after(UP, judge_a=BEFORE), "unmoved", ["judge_a does not change (+0.000"]),
        (after(UP, judge_a=NONE), "unmoved", ["judge_a cannot be compared (n/a, 0 samples)"]),
        (after(BOTH_WAYS, judge_a=DOWN), "falls", ["judge_a falls since", "no reward rises: face_score does not"]),
        (after(DOWN, judge_a=UP), "no gain", ["no gain yet: face_score falls", "judge_a rises"]),
        (after(NONE, judge_a=UP), "no gain", ["face_score cannot be compared"]),
        (after(UP), "unjudged", ["without a judge"]),
        ([line(0, BEFORE, {"judge_a": BEFORE})], "first", []),
        # One sample decides, and so do two that agree; two that do not agree are no change.
        (after([0.6], judge_a=[0.4]), "hacking", [f"judge_a falls since step 40 ({MINUS}0.100, 1 sample)"]),
        (after([0.6, 0.6], judge_a=[0.4, 0.5]), "hacking", ["2 samples"]),
        (after([0.6, 0.6], judge_a=[0.6, 0.5]), "unmoved", ["judge_a does not change"]),
        # A judge that was added later has nothing to compare with yet.
        ([line(0, BEFORE), line(40, UP, {"judge_a": UP})], "unmoved", ["judge_a is new"]),
    ],
)
def test_what_is_said(lines: list[dict[str, Any]], kind: str, said: list[str]) -> None:
    found = verdict(lines)
    assert found.kind == kind, found
    assert all(words in found.sentence for words in said), found.sentence
    assert "nan" not in found.sentence and ("reward hacking?" in found.sentence) == (kind == "hacking")


def test_several_rewards() -> None:
    lines = after(UP, judge_a=DOWN)
    for each in lines:
        each["rewards"] = ["sharpness", "face_score"]
    lines[0]["starts"]["sharpness"], lines[1]["starts"]["sharpness"] = [-0.1] * 4, [-0.2] * 4
    found = verdict(lines)
    assert found.kind == "hacking"
    assert "face_score rises" in found.sentence and "sharpness" not in found.sentence


def test_since_when_and_how_often_in_a_row() -> None:
    lines = [line(step, UP if step else BEFORE, {"judge_a": BEFORE}) for step in range(0, 60, 10)]
    for index, values in {1: DOWN, 2: UP, 4: DOWN, 5: DOWN}.items():
        lines[index]["starts"]["judge_a"] = values
    by_step = [verdict(lines[: end + 1]) for end in range(6)]
    assert [found.falling_in_row for found in by_step] == [0, 1, 0, 0, 1, 2]
    assert [dict(found.falling) for found in by_step[4:]] == [{"judge_a": 40}, {"judge_a": 40}]
    assert [found.is_bad for found in by_step] == [False, True, False, False, True, True]


def test_a_hidden_face_is_no_gain() -> None:
    """Count hidden faces: the judge's mean rises only because frames in which the person is lost show no face."""
    frames = ([[0.7, 0.3]] * 4, [[0.68, None]] * 4)
    lines = after(UP, judge_a=[0.68] * 4)
    for each, scores in zip(lines, frames, strict=True):
        each["starts"]["judge_a"] = [0.5 if each["step"] == 0 else 0.68] * 4
        each["frames"] = {"judge_a": scores}
    change = change_of(lines, "judge_a")
    assert change is not None and change.gain_missing_zero is not None
    assert change.gain.gain == pytest.approx(-0.02)
    assert change.gain.frames == 4
    assert change.gain_missing_zero.gain == pytest.approx(-0.16)
    assert verdict(lines).kind == "hacking"
    # The same holds if the scores of the other frames do not change.
    lines[1]["frames"] = {"judge_a": [[0.7, None]] * 4}
    change = change_of(lines, "judge_a")
    assert change is not None and (change.direction, change.hidden) == ("falls", True)
    assert change.gain.gain == 0
    said = f"judge_a falls since step 40 ({MINUS}0.150 ± 0, 4 samples, with 0 for frames that can no longer be scored)"
    assert said in verdict(lines).sentence


@pytest.mark.parametrize("change", ["other noise", "more starts"])
def test_what_was_measured_otherwise_is_not_compared(change: str) -> None:
    lines = after(UP, judge_a=DOWN)
    if change == "other noise":
        for each, key in zip(lines, "ab", strict=True):
            each["pairing"] = {"face_score": key, "judge_a": key}
    else:
        lines[0]["starts"] = {name: [*values, 0.5] for name, values in lines[0]["starts"].items()}
    assert verdict(lines).kind == "first"
    # Later lines are compared with those that were measured in the same way.
    assert verdict([*lines, {**lines[1], "step": 50}]).kind == "no gain"


def test_lines_take_it_up() -> None:
    first, last = after(UP, judge_a=DOWN)
    written, said = with_verdict([], first)
    assert written == first and said.kind == "first"
    written, said = with_verdict([first], last)
    assert written["verdict"]["kind"] == said.kind == "hacking"
    assert written["verdict"]["falling"] == {"judge_a": 40}
    paired = written["paired"]
    assert {*paired} == {"face_score", "judge_a", "psnr"}
    assert paired["face_score"]["gain"] == pytest.approx(0.0975)
    assert (paired["face_score"]["since"], paired["face_score"]["starts"], paired["face_score"]["starts_up"]) == (
        0,
        4,
        4,
    )
    assert paired["psnr"]["direction"] == "does not change"


def test_lines_of_another_make_say_nothing() -> None:
    assert verdict([{"step": 0}, {"step": 1, "face_score": 0.5}]).kind == "first"


@FEW
@given(st.lists(st.floats(-1, 1), max_size=8))
def test_direction_is_odd(differences: list[float]) -> None:
    opposite = {"rises": "falls", "falls": "rises"}
    there, back = (direction(PairedGain(tuple(sign * d for d in differences))) for sign in (1, -1))
    assert back == opposite.get(there, there)


@FEW
@given(st.lists(st.floats(0.5, 1), min_size=3, max_size=8), st.floats(0.1, 1000))
def test_direction_does_not_depend_on_the_scale(differences: list[float], scale: float) -> None:
    assert direction(PairedGain(tuple(differences))) == direction(PairedGain(tuple(scale * d for d in differences)))


def test_rounding_is_no_change() -> None:
    lines = [line(0, BEFORE), line(1, [value + 1e-7 for value in BEFORE if value])]
    change = change_of(lines, "face_score")
    assert change is not None and change.direction == "does not change"
