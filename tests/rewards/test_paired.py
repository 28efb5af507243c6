"""Paired comparison of the frames of validation samples, whichever of them have a score."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frostline.rewards.paired import PairedGain, pair_frames, pair_videos

SCORE = st.one_of(st.none(), st.just(math.nan), st.floats(-1, 1))
FEW = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PAIRS = st.lists(st.lists(st.tuples(SCORE, SCORE), max_size=6), max_size=6)


Side = list[list[float | None]]


def sides(pairs: list[list[tuple[float | None, float | None]]]) -> tuple[Side, Side]:
    return [[before for before, _ in start] for start in pairs], [[after for _, after in start] for start in pairs]


def test_only_frames_with_a_score_on_both_sides_are_compared() -> None:
    before = [[0.5, 0.1, None], [0.4, 0.4, 0.4]]
    # The worst frame of the first sample has no score any more: the mean rises, but no frame improves.
    after = [[0.5, None, 0.9], [0.5, 0.6, 0.4]]
    gain = pair_frames(before, after)
    assert gain.differences == pytest.approx((0.0, 0.1))
    assert (gain.frames, gain.starts, gain.starts_up) == (4, 2, 1)
    assert gain.gain == pytest.approx(0.05)
    assert gain.error == pytest.approx(0.05)
    zero = pair_frames(before, after, missing="zero")
    assert zero.differences == pytest.approx(((0.0 - 0.1 + 0.9) / 3, 0.1))
    assert zero.frames == 6


def test_a_start_that_is_never_scored_says_nothing() -> None:
    for missing in ("exclude", "zero"):
        gain = pair_frames([[None, math.nan], [0.5, 0.5]], [[None, None], [0.6, None]], missing)
        assert math.isnan(gain.differences[0]) and gain.starts == 1
    nothing = pair_frames([[None]], [[0.5]])
    assert (nothing.starts, nothing.frames) == (0, 0)
    assert math.isnan(nothing.gain) and math.isnan(nothing.error)
    # A face that was missing before counts as 0.
    assert pair_frames([[None]], [[0.5]], missing="zero").gain == 0.5


def test_whole_videos() -> None:
    gain = pair_videos([1.0, None, 3.0, 4.0], [2.0, 5.0, math.inf, 4.0])
    assert (gain.starts, gain.starts_up, gain.frames) == (2, 1, None)
    assert gain.gain == pytest.approx(0.5)


@pytest.mark.parametrize("after", [[[0.1]], [[0.1], [0.2, 0.3]]], ids=["starts", "frames"])
def test_what_differs_in_number_is_refused(after: list[list[float]]) -> None:
    with pytest.raises(ValueError):
        pair_frames([[0.1], [0.2]], after)


@FEW
@given(PAIRS)
def test_the_other_way_round_is_the_opposite(pairs: list[list[tuple[float | None, float | None]]]) -> None:
    before, after = sides(pairs)
    for missing in ("exclude", "zero"):
        there, back = pair_frames(before, after, missing), pair_frames(after, before, missing)
        assert _same(there.gain, -back.gain) and _same(there.error, back.error)
        assert (there.starts, there.frames) == (back.starts, back.frames)


@FEW
@given(PAIRS, st.floats(-1, 1))
def test_frames_that_one_side_lacks_change_nothing(
    pairs: list[list[tuple[float | None, float | None]]], score: float
) -> None:
    extended = [[*start, (score, None), (None, score)] for start in pairs]
    gain, same = pair_frames(*sides(pairs)), pair_frames(*sides(extended))
    assert _equal(gain, same)


@FEW
@given(PAIRS, st.randoms())
def test_neither_order_counts(pairs: list[list[tuple[float | None, float | None]]], random: object) -> None:
    shuffled = [[*start] for start in pairs]
    for part in (*shuffled, shuffled):
        random.shuffle(part)  # type: ignore[attr-defined]
    for missing in ("exclude", "zero"):
        one, other = pair_frames(*sides(pairs), missing), pair_frames(*sides(shuffled), missing)
        assert _same(one.gain, other.gain) and _same(one.error, other.error) and one.frames == other.frames


@FEW
@given(PAIRS)
def test_the_gain_lies_between_the_differences(pairs: list[list[tuple[float | None, float | None]]]) -> None:
    gain = pair_frames(*sides(pairs))
    if gain.starts:
        assert min(gain.found) - 1e-12 <= gain.gain <= max(gain.found) + 1e-12
    assert gain.starts <= len(pairs)
    assert pair_frames(*sides([[(b, b) for b, _ in start] for start in pairs])).gain in (
        0,
        pytest.approx(math.nan, nan_ok=True),
    )


def _same(one: float, other: float) -> bool:
    return (math.isnan(one) and math.isnan(other)) or math.isclose(one, other, abs_tol=1e-12)


def _equal(one: PairedGain, other: PairedGain) -> bool:
    same = all(_same(a, b) for a, b in zip(one.differences, other.differences, strict=True))
    return same and one.frames == other.frames
