"""What precomputing takes on disk, and what it spares in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.video_shape import VideoShape
from frostline.stages.families import family_of
from frostline.stages.video_model import VideoModel
from frostline.train.precompute.frozen import frozen_stages
from frostline.train.settings import RunSettings

# Of a device's memory: weights of fewer bytes are not worth a pass over the data before the first step.
_WORTHWHILE = 0.1
# What weights take in memory is at most so many times their files: 8 bits in fp32.
_LARGEST_EXPANSION = 4
# A cache's file beside its tensors.
_HEADER_BYTES = 1024
_FP32_BYTES = 4
_GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """What precomputing for a run takes and gives.

    stages: that training then does without. weights: bytes of these. samples: of training and of validation.
    nbytes: of the cache on disk, at most; the references of rewards, which are small, are not among them.
    """

    stages: tuple[str, ...]
    weights: int
    samples: tuple[int, int]
    nbytes: int

    def __str__(self) -> str:
        training, held_out = self.samples
        return (
            f"{training} samples and {held_out} held-out starts, at most {self.nbytes / _GB:.2f} GB on disk; training "
            f"then does without {', '.join(self.stages)} ({self.weights / _GB:.2f} GB)"
        )


def estimate(model: VideoModel, settings: RunSettings, samples: tuple[int, int]) -> Estimate:
    """Estimate what precomputing takes from sizes alone.

    Args:
        model: its weights need not be in memory.
        samples: different ones that the run trains on, and held-out starts.
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
    """Return whether the files of the model alone tell that no weights are worth precomputing."""
    files = sum(path.stat().st_size for path in family_of(settings.model).files(settings.model))
    return _LARGEST_EXPANSION * files < _WORTHWHILE * device_bytes


def reason_against(estimated: Estimate, settings: RunSettings, device_bytes: int) -> str | None:
    """Return why `precompute: auto` leaves it, in a clause; None where it does precompute.

    Args:
        device_bytes: memory of the device.
    """
    if settings.cache_bytes == 0:
        return "cache_bytes 0 switches the cache off"
    if estimated.weights < _WORTHWHILE * device_bytes:
        share = f"less than {_WORTHWHILE:.0%} of the device's {device_bytes / _GB:.2f} GB"
        return f"training could do without {estimated.weights / _GB:.2f} GB of weights alone, {share}"
    return too_large(estimated, settings)


def too_large(estimated: Estimate, settings: RunSettings) -> str | None:
    """Return why the cache cannot hold all of it, in a clause; None where it can."""
    if estimated.nbytes <= settings.cache_bytes:
        return None
    return (
        f"the frozen outputs need up to {estimated.nbytes} bytes, and cache_bytes is {settings.cache_bytes}: raise it"
    )


def _weights(model: VideoModel) -> dict[str, int]:
    """Bytes by stage, of parts whose weights may be away."""
    parts = getattr(model.components, "weights", {})
    return {stage: part.nbytes for stage, part in parts.items()}


def _kept_latents(
    model: VideoModel, settings: RunSettings, steps: DenoiseSteps, stages: Sequence[str]
) -> tuple[int, int]:
    """How many latents are kept of each sample, and of each held-out start."""
    ahead = int(model.experts[0].stage in stages and steps.high_noise > 0)
    if settings.rollout.policy != "base" or settings.noise_seed is None:
        return ahead, ahead
    # Those before each step that may be the first live one, which the run adds.
    return ahead + (len(steps.may_be_live) if steps.drawn else 1), ahead


def _latents(model: VideoModel, shape: VideoShape) -> int:
    frames, height, width = model.geometry.latent_grid(shape.num_frames, shape.height, shape.width)
    return model.latent_channels * frames * height * width


def _bytes_of_one(model: VideoModel, shape: VideoShape, kept_latents: int, clips: bool) -> int:
    given = model.denoiser_sample(shape)
    latents = _latents(model, shape)
    # What the denoiser is not given as an input is put into its latents.
    names = (*model.condition_names, *(["latents"] if clips else []))
    conditions = [given[name].nbytes if name in given else given["latents"].nbytes for name in names]
    return sum(conditions) + kept_latents * latents * _FP32_BYTES + (len(conditions) + kept_latents) * _HEADER_BYTES
