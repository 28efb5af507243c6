"""How good the model is on held-out starts, every stage frozen, the noise always the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from frostline.train.data import Sample, collate
from frostline.train.module import WanTrainingModule


@dataclass(frozen=True)
class Evaluation:
    """Per start: face_score, detection_rate in [0, 1], psnr (dB to the true clip), all (N,); videos (N, T, 3, H, W)."""

    face_score: Tensor
    detection_rate: Tensor
    psnr: Tensor
    videos: Tensor


@torch.no_grad()
def evaluate(
    module: WanTrainingModule,
    dataset: Dataset[Sample],
    count: int,
    *,
    noise_seed: int = 0,
    batch_size: int = 5,
    advance: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Generate from the first `count` samples of `dataset` and score against their videos.

    Each start has its own noise, seeded by its index, so that runs before and after training compare.

    Args:
        advance: called with the number of starts just finished.
    """
    parts = []
    for first in range(0, count, batch_size):
        index = range(first, min(first + batch_size, count))
        batch = collate([dataset[i] for i in index])
        conditioning = module.forward_preprocess(batch)
        noise = torch.stack([_noise(conditioning.latent_shape, noise_seed, i) for i in index])
        videos = module.generate(conditioning, noise.to(conditioning.context.device))
        score = module.reward.score(videos, conditioning.references)
        truth = batch["video"].to(videos.device)
        parts.append((score.face_score, score.detection_rate, _psnr(videos, truth), videos))
        advance(len(index))
    face_score, detection_rate, psnr, videos = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Evaluation(face_score, detection_rate, psnr, videos)


def _noise(shape: tuple[int, ...], seed: int, index: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1_000_003 * (seed + 1) + index))


def _psnr(video: Tensor, truth: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB of videos in [0, 1]."""
    return -10 * torch.log10((video - truth).pow(2).flatten(1).mean(1).clamp(min=1e-10))
