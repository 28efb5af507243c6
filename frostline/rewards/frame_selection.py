"""Select the generated frames to score; scoring fewer frames takes less time and memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

# Settings are read without importing torch.
if TYPE_CHECKING:
    from torch import Tensor

ALL = "all"
_FORM = re.compile(r"all|first|last|(every|random):([1-9]\d*)")


def check_selection(text: str) -> str:
    """Return `text` if it is `all`, `first`, `last`, `every:N` or `random:N`.

    Raises:
        ValueError: it is something else.
    """
    if _FORM.fullmatch(text) is None:
        raise ValueError(f"must be all, first, last, every:N or random:N with N >= 1, not {text!r}")
    return text


def select_frames(frames: Tensor, selection: str) -> Tensor:
    """Return the first frame and the selected frames after it, in their order.

    Args:
        frames: (B, T, 3, H, W). Frame 0 is given to the generated video, so frames 1…T-1 are selected from: `first` is
            frame 1, `last` frame T-1, `every:N` frames 1, 1 + N, ….
        selection: see `check_selection`. `random:N` selects different frames in each call, with torch's CPU generator.
            Without gradients, as in validation, the N frames are evenly spaced instead, so that results are comparable.
    """
    import torch

    kind, _, number = selection.partition(":")
    generated = torch.arange(1, frames.shape[1])
    if kind == ALL or len(generated) == 0:
        return frames
    if kind == "first":
        chosen = generated[:1]
    elif kind == "last":
        chosen = generated[-1:]
    elif kind == "every":
        chosen = generated[:: int(number)]
    else:
        count = min(int(number), len(generated))
        if torch.is_grad_enabled():
            places = torch.randperm(len(generated))[:count].sort().values
        else:
            places = evenly_spaced(count, len(generated))
        chosen = generated[places]
    return frames[:, [0, *chosen.tolist()]]


def evenly_spaced(count: int, among: int) -> Tensor:
    """Return `count` int64 indices below `among` at equal distances."""
    import torch

    return (torch.arange(count) + 0.5).mul(among / count).long()


def count_selected(num_frames: int, selection: str) -> int:
    """Return the number of generated frames, among 1…T-1, that `select_frames` selects in a clip of T frames."""
    kind, _, number = selection.partition(":")
    generated = num_frames - 1
    if kind == ALL:
        return generated
    if kind == "every":
        return -(-generated // int(number))
    return min(generated, int(number or 1))
