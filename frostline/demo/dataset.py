"""The demo's data: clips of the tiny model's world as real mp4 files with a `metadata.csv`."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from frostline.models.tiny.clips import Clips, held_out_clips, render_clips
from frostline.video import write_video

_FPS = 8
_TRAIN_SEED, _HELD_OUT_SEED = 500, 4242


def write_datasets(folder: Path, train_clips: int, held_out: int) -> tuple[Path, Path]:
    """Write both datasets; returns their metadata files. The held-out starts appear nowhere in training."""
    train = render_clips(train_clips, torch.Generator().manual_seed(_TRAIN_SEED))
    return (
        _write(folder / "train", train),
        _write(folder / "held_out", held_out_clips(held_out, _HELD_OUT_SEED)),
    )


def write_clips(out: Path, name: str, videos: Tensor, metadata: Path) -> Path:
    """Write generated (N, T, 3, H, W) clips into `out/clips/name`, and `out/name.csv`, which `frostline score` takes.

    Args:
        metadata: of the true clips, which are the references, in the same order; inside of `out`.
    """
    rows = []
    for index, video in enumerate(videos):
        clip = write_video(out / "clips" / name / f"clip_{index:03d}.mp4", video, fps=_FPS, lossless=True)
        truth = metadata.parent / f"clip_{index:03d}.mp4"
        rows.append({"video": clip.relative_to(out), "reference": truth.relative_to(out)})
    return _write_rows(out / f"{name}.csv", rows)


def _write(folder: Path, clips: Clips) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (video, prompt) in enumerate(zip(clips.video, clips.prompts, strict=True)):
        name = f"clip_{index:03d}.mp4"
        write_video(folder / name, video, fps=_FPS, lossless=True)
        rows.append({"video": name, "prompt": prompt})
    return _write_rows(folder / "metadata.csv", rows)


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
