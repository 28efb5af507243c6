"""Invalid frames and paths are refused, and no file is left."""

from pathlib import Path

import pytest
import torch

from frostline.errors import ConfigError, DataError
from frostline.video import write_video


@pytest.mark.parametrize(
    ("frames", "fragment"),
    [
        (torch.zeros(2, 16, 16, 3), "must have shape (T, 3, H, W), not (2, 16, 16, 3)"),
        (torch.zeros(0, 3, 16, 16), "must have shape (T, 3, H, W)"),
        (torch.zeros(3, 16, 16), "must have shape (T, 3, H, W)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "uint8 or float in [0, 1], not torch.int64"),
        (torch.full((2, 3, 16, 16), torch.nan), "NaN"),
    ],
)
def test_bad_frames_are_not_written(tmp_path: Path, frames: torch.Tensor, fragment: str) -> None:
    with pytest.raises(DataError) as caught:
        write_video(tmp_path / "a.mp4", frames)
    assert "a.mp4" in str(caught.value)
    assert fragment in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_targets_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    video = torch.zeros(5, 3, 48, 64)
    with pytest.raises(DataError, match=r"written to a \.mp4 file"):
        write_video(tmp_path / "a.avi", video)
    with pytest.raises(ConfigError, match="fps"):
        write_video(tmp_path / "a.mp4", video, fps=0)
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(DataError, match=r"taken\.mp4: cannot be written"):
        write_video(tmp_path / "taken.mp4", video)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_video(tmp_path / "file" / "a.mp4", video)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "taken.mp4"]
