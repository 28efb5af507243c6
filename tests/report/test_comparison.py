"""Clips next to each other: the same frames of all clips, with the scores of these frames."""

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from frostline.errors import DataError
from frostline.report.comparison import Comparison
from frostline.video import write_video


def grey(path: Path, frames: int) -> Path:
    """Write a clip whose frame t has the grey level 10 + 12 t."""
    values = torch.arange(frames, dtype=torch.float32).mul(12).add(10).to(torch.uint8)
    return write_video(path, values[:, None, None, None].expand(frames, 3, 32, 48).contiguous(), fps=8)


def test_all_clips_show_the_same_frames(tmp_path: Path) -> None:
    clips = {"before": grey(tmp_path / "before.mp4", 17), "truth": grey(tmp_path / "truth.mp4", 9)}
    scores = {"before": [t / 100 for t in range(17)], "truth": [None, *[0.5] * 8]}
    made = Comparison.of("a person nods", "start 0", clips, frame_scores=scores, captions={"before": "0.5"})
    assert made.numbers == (0, 2, 4, 6, 8, 10, 12, 14, 16)
    assert (made.fps, made.last_frame) == (8.0, 16)
    before, truth = made.clips
    assert before.scores == ("0.00", "0.02", "0.04", "0.06", "0.08", "0.10", "0.12", "0.14", "0.16")
    # The shorter clip only has these frames.
    assert truth.scores == ("\N{EN DASH}", "0.50", "0.50", "0.50", "0.50") and truth.shown == 5
    assert (before.caption, truth.caption) == ("before 0.5", "truth")
    for clip, path in ((before, clips["before"]), (truth, clips["truth"])):
        assert base64.b64decode(clip.video.removeprefix("data:video/mp4;base64,")) == path.read_bytes()
    for clip, numbers in ((before, made.numbers), (truth, made.numbers[:5])):
        jpeg = base64.b64decode(clip.strip.removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(jpeg)) as image:
            assert image.size == (48 * len(numbers), 32)
            shown = [image.convert("L").getpixel((48 * place + 24, 16)) for place in range(len(numbers))]
        assert shown == pytest.approx([10 + 12 * number for number in numbers], abs=4)


def test_scores_of_another_number_of_frames_are_left_out(tmp_path: Path) -> None:
    made = Comparison.of("", "", {"a": grey(tmp_path / "a.mp4", 3)}, frame_scores={"a": [0.1, 0.2]})
    assert made.clips[0].scores == ()


def test_a_clip_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_text("no video")
    with pytest.raises(DataError, match=r"broken\.mp4"):
        Comparison.of("", "", {"a": tmp_path / "broken.mp4"})
