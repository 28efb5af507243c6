"""Training files that need more memory than there is are invalid rows; large files that fit are resized."""

from pathlib import Path

from large_files import huge_gif, run_within


def test_a_large_frame_is_resized_while_it_is_read(tmp_path: Path) -> None:
    """Resize a larger frame channel by channel while it is read."""
    (tmp_path / "data").mkdir()
    huge_gif(tmp_path / "data" / "a.gif", frames=3)
    (tmp_path / "data" / "a.txt").write_text("a person")
    code = """
import resource, torch
torch.set_num_threads(1)
from frostline.train.data.dataset import VideoPromptDataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sample = VideoPromptDataset("data", num_frames=5, height=64, width=64)[0]
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
print(tuple(sample["video"].shape), sample["valid_frames"], grown)
"""
    result = run_within(16, code, tmp_path)
    shape, _, rest = result.stdout.rpartition(")")
    assert shape == "(5, 3, 64, 64", result.stderr[-2000:]
    valid_frames, grown = rest.split()
    # A frame of 0.4 GB, one or two copies during the conversion, and a channel in float32.
    assert valid_frames == "3" and float(grown) < 2.0


def test_a_training_file_that_is_too_large_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.txt").write_text("a person")
    huge_gif(tmp_path / "data" / "a.gif")
    huge_gif(tmp_path / "data" / "b.gif", side=64)
    code = """
import torch
torch.set_num_threads(1)
from frostline.errors import DataError
from frostline.train.data.dataset import VideoPromptDataset
dataset = VideoPromptDataset("data", num_frames=5)
print(tuple(dataset[1]["video"].shape))
try:
    dataset[0]
except DataError as error:
    print(error)
"""
    result = run_within(1.2, code, tmp_path)
    assert result.stdout.startswith("(5, 3, 64, 64)\n"), result.stderr
    assert "a.gif" in result.stdout and "memory" in result.stdout, result.stdout
