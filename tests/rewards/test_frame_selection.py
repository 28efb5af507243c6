"""The frames that a reward selects."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frostline.errors import ConfigError
from frostline.rewards.config import RewardEntry
from frostline.rewards.frame_selection import check_selection, select_frames


def numbered(count: int) -> torch.Tensor:
    """Return (1, T, 1, 1, 1), in which the value of each frame is its number."""
    return torch.arange(float(count))[None, :, None, None, None]


def chosen(count: int, selection: str) -> list[int]:
    return [int(number) for number in select_frames(numbered(count), selection).flatten().tolist()]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("first", [0, 1]),
        ("last", [0, 8]),
        ("every:3", [0, 1, 4, 7]),
        ("every:99", [0, 1]),
        ("random:99", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_the_first_frame_and_the_selected_ones(selection: str, expected: list[int]) -> None:
    assert chosen(9, selection) == expected


def test_random_frames_are_drawn_anew_from_the_seed_and_evenly_spaced_in_validation() -> None:
    torch.manual_seed(3)
    drawn = [tuple(chosen(17, "random:4")) for _ in range(20)]
    assert len({*drawn}) > 10
    torch.manual_seed(3)
    assert drawn == [tuple(chosen(17, "random:4")) for _ in range(20)]
    with torch.no_grad():
        assert chosen(17, "random:4") == chosen(17, "random:4") == [0, 3, 7, 11, 15]


@given(st.integers(2, 40), st.integers(1, 50), st.booleans())
def test_no_frame_twice_and_the_cost_is_fixed(count: int, number: int, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        frames = chosen(count, f"random:{number}")
    assert frames == sorted({*frames})
    assert len(frames) == 1 + min(number, count - 1)


def test_each_frame_is_drawn_as_often_as_the_others() -> None:
    torch.manual_seed(0)
    counts = torch.zeros(9)
    for _ in range(1600):
        counts[chosen(9, "random:2")] += 1
    assert counts[0] == 1600
    assert (counts[1:] - 400).abs().max() < 80


@pytest.mark.parametrize("text", ["", "every", "every:0", "every:-1", "random", "first:2", "some", "every:2x"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be all, first, last, every:N or random:N"):
        check_selection(text)
    with pytest.raises(ConfigError, match="frames: must be all, first"):
        RewardEntry.parse({"type": "sharpness", "frames": text})
