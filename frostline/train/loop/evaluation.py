"""How good the model is on held-out starts, every stage frozen, the noise always the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from frostline.train.data.dataset import Sample, collate
from frostline.train.step.module import TrainingModule


@dataclass(frozen=True)
class Evaluation:
    """N generated videos (N, T, 3, H, W) in [0, 1], on the CPU, and how good they are.

    measured: (N,) by name: every reward's score and further metrics (`face_score`, `detection_rate`, …), and `psnr`,
    dB to the true clip as far as that goes. The score is NaN of a video that does not count.
    """

    measured: dict[str, Tensor]
    videos: Tensor


@torch.no_grad()
def evaluate(
    module: TrainingModule,
    dataset: Dataset[Sample],
    starts: Sequence[int],
    *,
    noise_seed: int = 0,
    batch_size: int = 5,
    advance: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Generate from the samples `starts` of `dataset` and score against their videos.

    Each start has its own noise, seeded by its index, so that runs before and after training compare.

    Args:
        advance: called with the number of starts just finished.
    """
    measured, videos = [], []
    for first in range(0, len(starts), batch_size):
        index = starts[first : first + batch_size]
        batch = collate([dataset[i] for i in index])
        conditioning = module.forward_preprocess(batch)
        noise = torch.stack([_noise(conditioning.latent_shape, noise_seed, i) for i in index])
        generated = module.generate(conditioning, noise.to(conditioning.device))
        values = {"psnr": _psnr(generated, batch["video"].to(generated.device), batch["valid_frames"])}
        for active, score in module.score(generated, conditioning):
            counts = score.valid | (active.config.on_unscored == "zero")
            values |= {active.name: torch.where(counts, score.score, torch.nan), **score.metrics}
        measured.append({name: value.cpu() for name, value in values.items()})
        videos.append(generated.cpu())
        advance(len(index))
    return Evaluation({name: torch.cat([part[name] for part in measured]) for name in measured[0]}, torch.cat(videos))


def _noise(shape: tuple[int, ...], seed: int, index: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1_000_003 * (seed + 1) + index))


def _psnr(video: Tensor, truth: Tensor, frames: Sequence[int]) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB of videos in [0, 1], each over its first so many frames."""
    errors = [(sample - true)[:own].pow(2).mean() for sample, true, own in zip(video, truth, frames, strict=True)]
    return -10 * torch.log10(torch.stack(errors).clamp(min=1e-10))
