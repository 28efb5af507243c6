"""Write the demo's datasets: rendered clips for the tiny model as MP4 files with a `metadata.csv`."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from frostline.models.tiny.clips import Clips, held_out_clips, render_clips
from frostline.video import write_video

_FPS = 8
_TRAIN_SEED, _HELD_OUT_SEED = 500, 4242


def write_datasets(folder: Path, train_clips: int, held_out: int) -> None:
    """Write the datasets `folder/train` and `folder/held_out`.

    Args:
        folder: the folder to write to.
        train_clips: the number of training clips.
        held_out: the number of validation clips; their first frames are not in the training data.
    """
    _write(folder / "train", render_clips(train_clips, torch.Generator().manual_seed(_TRAIN_SEED)))
    _write(folder / "held_out", held_out_clips(held_out, _HELD_OUT_SEED))


def _write(folder: Path, clips: Clips) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (video, prompt) in enumerate(zip(clips.video, clips.prompts, strict=True)):
        name = f"clip_{index:03d}.mp4"
        write_video(folder / name, video, fps=_FPS, lossless=True)
        rows.append({"video": name, "prompt": prompt})
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["video", "prompt"])
        writer.writeheader()
        writer.writerows(rows)
