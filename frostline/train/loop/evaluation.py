"""Evaluate the model on validation samples, with all stages frozen and fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset

from frostline.rewards.active import ActiveReward
from frostline.rewards.config import OF_THE_LOSS
from frostline.rewards.reward import RewardScore
from frostline.runtime.cache import content_key
from frostline.train.data.dataset import Sample, collate
from frostline.train.judging.judge import Judge
from frostline.train.judging.likeness import build_likeness, likeness
from frostline.train.loop.state import unchanged_random
from frostline.train.step.conditioning import Conditioning
from frostline.train.step.module import TrainingModule

PSNR = "psnr"
PSNR_ABOUT = (
    "Peak signal-to-noise ratio relative to the true clip, in decibels; higher is more "
    "similar. A clear decrease means that the reward was increased at the expense of "
    "picture quality."
)
# Length of a pairing key: enough to distinguish the few settings of a run's validations.
_KEY_DIGITS = 12


@dataclass(frozen=True)
class Evaluation:
    """N generated videos (N, T, 3, H, W) in [0, 1], on the CPU, and their measures.

    Attributes:
        measured: (N,) by name: scores and metrics of all rewards (`face_score`, `detection_rate`, …) and judges
            (`judge_<label>`, `judge_<label>_<metric>`); `psnr`, in dB over the frames of the true clip; and
            `sharpness_ratio` and `motion_ratio`, relative to the true clip, unless a reward or judge measures them. NaN
            for a score that does not count, and for PSNR and ratios of a sample without a clip.
        frames: (N, T) by name of a score, for rewards and judges that score single frames; NaN for frames that could
            not be scored.
        rewards, judges: names of the scores that are trained on, and of those that are not.
        settings: for each measure, a key of the settings of the reward or judge.
        samples: content keys of the samples.
    """

    measured: dict[str, Tensor]
    videos: Tensor
    frames: dict[str, Tensor] = field(default_factory=dict)
    rewards: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    samples: tuple[str, ...] = ()

    @classmethod
    def join(cls, parts: Sequence[Evaluation], count: int | None = None) -> Evaluation:
        """Concatenate parts with the same measures, and keep the first `count` videos, or all if None."""
        first = parts[0]
        return cls(
            measured={name: torch.cat([part.measured[name] for part in parts])[:count] for name in first.measured},
            videos=torch.cat([part.videos for part in parts])[:count],
            frames={name: torch.cat([part.frames[name] for part in parts])[:count] for name in first.frames},
            rewards=first.rewards,
            judges=first.judges,
            settings=first.settings,
            samples=tuple(key for part in parts for key in part.samples)[:count],
        )


@torch.no_grad()
def evaluate(
    module: TrainingModule,
    dataset: Dataset[Sample],
    starts: Sequence[int],
    *,
    noise_seed: int = 0,
    batch_size: int = 5,
    judges: Sequence[Judge] = (),
    advance: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Generate videos for the samples `starts` of `dataset`, and score them against their references or clips.

    Each sample has its own noise, seeded by its index, so that runs before and after training are comparable. The
    states of the random generators are restored afterwards, so that training is not affected by random numbers that
    rewards or judges use.

    Args:
        judges: further rewards that score the videos.
        advance: called with the number of samples just finished.
    """
    parts, measurers = [], build_likeness(module)
    with unchanged_random():
        for first in range(0, len(starts), batch_size):
            index = starts[first : first + batch_size]
            batch = collate([dataset[i] for i in index])
            conditioning = module.forward_preprocess(batch)
            noise = start_noise(conditioning.latent_shape, noise_seed, index)
            latents = module.generate_latents(conditioning, noise.to(conditioning.device), comes_again=True)
            generated = module.decode(latents)
            psnr = _psnr(generated, batch["video"].to(generated.device), batch["valid_frames"])
            parts.append(_measured(module, generated, latents, conditioning, judges, measurers, psnr))
            advance(len(index))
    return Evaluation.join(parts)


def _measured(
    module: TrainingModule,
    generated: Tensor,
    latents: Tensor,
    conditioning: Conditioning,
    judges: Sequence[Judge],
    measurers: tuple[Judge, ...],
    psnr: Tensor,
) -> Evaluation:
    measured, frames, settings = {PSNR: psnr}, {}, {PSNR: ""}
    rewarded = [(active.name, active, scored) for active, scored in module.score(generated, conditioning, latents)]
    judged = [(judge.name, judge.active, judge.score(generated, conditioning, latents)) for judge in judges]
    for name, active, scored in (*rewarded, *judged):
        measured |= {name: _counting(active, scored), **scored.metrics}
        settings |= dict.fromkeys((name, *scored.metrics), _settings_key(active))
        if scored.frame_scores is not None:
            frames[name] = scored.frame_scores
    for name, (measurer, ratio) in likeness(measurers, measured, generated, conditioning).items():
        measured[name], settings[name] = ratio, _settings_key(measurer.active)
    return Evaluation(
        measured={name: values.cpu() for name, values in measured.items()},
        videos=generated.cpu(),
        frames={name: values.float().cpu() for name, values in frames.items()},
        rewards=tuple(name for name, *_ in rewarded),
        judges=tuple(name for name, *_ in judged),
        settings=settings,
        samples=conditioning.sample_keys,
    )


def _counting(active: ActiveReward, scored: RewardScore) -> Tensor:
    """Return the (B,) scores, with NaN for videos that do not count."""
    counts = scored.valid | (active.config.on_unscored == "zero")
    return torch.where(counts, scored.score, torch.nan)


def _settings_key(active: ActiveReward) -> str:
    return content_key(
        config=active.config.model_dump(mode="json", exclude={*OF_THE_LOSS}), references=active.references_key
    )


def pairing_keys(evaluation: Evaluation, noise_seed: int) -> dict[str, str]:
    """Return a key for each measure; if the keys of two validations are equal, they measured the same samples in the
    same way.
    """
    starts = content_key(samples=list(evaluation.samples), noise_seed=noise_seed)
    return {name: content_key(starts=starts, settings=key)[:_KEY_DIGITS] for name, key in evaluation.settings.items()}


def start_noise(shape: tuple[int, ...], seed: int, starts: Sequence[int]) -> Tensor:
    """Return the start noise (B, C, F, h, w) of samples of a dataset, on the CPU; the same in every call."""
    seeds = [1_000_003 * (seed + 1) + index for index in starts]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(each)) for each in seeds])


def _psnr(video: Tensor, truth: Tensor, frames: Sequence[int]) -> Tensor:
    """Return the PSNR (B,) in dB of videos in [0, 1], each over its first `frames[b]` frames; NaN for 0 frames."""
    errors = [(sample - true)[:own].pow(2).mean() for sample, true, own in zip(video, truth, frames, strict=True)]
    return -10 * torch.log10(torch.stack(errors).clamp(min=1e-10))
