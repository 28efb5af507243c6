"""The disk space that precomputing needs, and the memory that it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.video_shape import VideoShape
from frostline.stages.families import family_of
from frostline.stages.video_model import VideoModel
from frostline.train.precompute.frozen import frozen_stages
from frostline.train.settings import RunSettings

# Fraction of a device's memory; saving less memory than this is not worth a pass over the data.
_WORTHWHILE = 0.1
# Maximum ratio of weights in memory to their files: 8 bits to fp32.
_LARGEST_EXPANSION = 4
# Overhead of a cache file.
_HEADER_BYTES = 1024
_FP32_BYTES = 4
_GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """Disk space and saved memory of precomputing for a run.

    Attributes:
        stages: stages that training does not need afterwards.
        weights: size of their weights in bytes.
        samples: number of samples of training and of validation.
        nbytes: maximum size of the cache on disk, without the references of rewards, which are small.
    """

    stages: tuple[str, ...]
    weights: int
    samples: tuple[int, int]
    nbytes: int

    def __str__(self) -> str:
        training, held_out = self.samples
        return (
            f"{training} samples and {held_out} validation samples, at most {self.nbytes / _GB:.2f} "
            f"GB on disk; training does not need {', '.join(self.stages)} ({self.weights / _GB:.2f} "
            "GB) afterwards"
        )


def estimate(model: VideoModel, settings: RunSettings, samples: tuple[int, int]) -> Estimate:
    """Estimate the disk space that precomputing needs and the memory that it saves, only from sizes.

    Args:
        model: its weights need not be in memory.
        samples: number of different training samples, and of validation samples.
    """
    stages = frozen_stages(model, settings, family_of(model.components).FROZEN_STAGES)
    parameters = model.stage_parameters()
    itemsize = settings.train.weight_dtype.itemsize
    sizes = _weights(model)
    weights = sum(sizes.get(stage, itemsize * sum(p.numel() for p in parameters[stage])) for stage in stages)
    steps = DenoiseSteps.of(settings, model.boundary, len(model.experts) > 1)
    kept = _kept_latents(model, settings, steps, stages)
    shapes = (settings.data.shape(model.geometry, 1), settings.validation.shape(model.geometry, 1))
    clips = settings.sft_weight > 0
    each = [_bytes_of_one(model, shape, count, clips) for shape, count in zip(shapes, kept, strict=True)]
    nbytes = sum(count * of_one for count, of_one in zip(samples, each, strict=True))
    return Estimate(stages, weights, samples, nbytes)


def is_small(settings: RunSettings, device_bytes: int) -> bool:
    """Return whether the size of the model's files shows that precomputing is not worthwhile."""
    files = sum(path.stat().st_size for path in family_of(settings.model).files(settings.model))
    return _LARGEST_EXPANSION * files < _WORTHWHILE * device_bytes


def reason_against(estimated: Estimate, settings: RunSettings, device_bytes: int) -> str | None:
    """Return why `precompute: auto` does not precompute; None if it does.

    Args:
        device_bytes: memory of the device.
    """
    if settings.cache_bytes == 0:
        return "the cache is disabled (cache_bytes is 0)"
    if estimated.weights < _WORTHWHILE * device_bytes:
        share = f"less than {_WORTHWHILE:.0%} of the device's {device_bytes / _GB:.2f} GB"
        return f"training could save only {estimated.weights / _GB:.2f} GB of weights, {share}"
    return too_large(estimated, settings)


def too_large(estimated: Estimate, settings: RunSettings) -> str | None:
    """Return why the cache is too small; None if it is large enough."""
    if estimated.nbytes <= settings.cache_bytes:
        return None
    return (
        f"the frozen outputs need up to {estimated.nbytes} bytes, but cache_bytes is "
        f"{settings.cache_bytes}: increase it"
    )


def _weights(model: VideoModel) -> dict[str, int]:
    """Return bytes by stage, for parts whose weights can be released."""
    parts = getattr(model.components, "weights", {})
    return {stage: part.nbytes for stage, part in parts.items()}


def _kept_latents(
    model: VideoModel, settings: RunSettings, steps: DenoiseSteps, stages: Sequence[str]
) -> tuple[int, int]:
    """Return the number of cached latents for each training sample and for each validation sample."""
    ahead = int(model.experts[0].stage in stages and steps.high_noise > 0)
    if settings.rollout.policy != "base" or settings.noise_seed is None:
        return ahead, ahead
    # During training, the latents before each step that can be the first live one are cached, too.
    return ahead + (len(steps.may_be_live) if steps.drawn else 1), ahead


def _latents(model: VideoModel, shape: VideoShape) -> int:
    frames, height, width = model.geometry.latent_grid(shape.num_frames, shape.height, shape.width)
    return model.latent_channels * frames * height * width


def _bytes_of_one(model: VideoModel, shape: VideoShape, kept_latents: int, clips: bool) -> int:
    given = model.denoiser_sample(shape)
    latents = _latents(model, shape)
    # Conditions that are not denoiser inputs are inserted into its latents.
    names = (*model.condition_names, *(["latents"] if clips else []))
    conditions = [given[name].nbytes if name in given else given["latents"].nbytes for name in names]
    return sum(conditions) + kept_latents * latents * _FP32_BYTES + (len(conditions) + kept_latents) * _HEADER_BYTES
