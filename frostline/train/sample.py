"""`frostline sample`: generate a clip from a picture and a prompt, with or without an adapter, all stages frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from frostline.atomic_io import check_writable
from frostline.config import LoraSettings
from frostline.errors import ConfigError
from frostline.experts import ExpertName, Experts
from frostline.models.lora import UniformLora, read_adapters, uniform_loras
from frostline.models.lora.inject import copy_adapter, fill_up
from frostline.models.precision import parse_precision
from frostline.runtime.device import free_memory, resolve_device
from frostline.runtime.planning.plan import Plan, parse_plan
from frostline.stages.families import check_adapters, family_of
from frostline.train.data.cutting import crop_to, size_within
from frostline.train.sample_settings import SampleSettings
from frostline.train.step.module import TrainingModule
from frostline.train.validate_settings import check_offload
from frostline.video import read_video, write_video


@dataclass(frozen=True)
class SampledClip:
    """A sampled clip.

    Attributes:
        video: (T, 3, H, W) in [0, 1].
        face_score: similarity of the faces in the clip to the face in the picture; None without a picture.
        detection_rate: fraction of the generated frames in which a face was found; None without a picture.
    """

    video: Tensor
    face_score: float | None
    detection_rate: float | None
    plan: Plan


def sample_clip(settings: SampleSettings, out: Path) -> SampledClip:
    """Sample a clip and write it to `out` (.mp4).

    Raises:
        ConfigError: the model, the adapter, the plan or the size is invalid, or the device does not support
            `offload_blocks`.
        DataError: the picture cannot be read, or the clip cannot be written.
    """
    if out.suffix.lower() != ".mp4":
        raise ConfigError(f"--out {out}: must be a .mp4 file")
    check_writable(out)
    # Run fast checks before loading the model, which takes minutes.
    check_offload(settings.offload_blocks, resolve_device(settings.device).type == "cpu", setting="offload_blocks")
    loras = {} if settings.adapter is None else _read_loras(settings.adapter, settings)
    family_of(settings.model).check_base_adapters(settings.model, settings.base_adapters)
    if settings.image is None and family_of(settings.model).read_spec(settings.model).needs_image:
        raise ConfigError(f"{settings.model} needs a first frame: use --image")
    picture = None if settings.image is None else read_video(settings.image, max_frames=1)
    module = load_for_sampling(settings, loras)
    clip = _sample(module, settings, picture)
    write_video(out, clip.video, fps=settings.fps)
    return clip


def _read_loras(path: Path, settings: SampleSettings) -> dict[ExpertName, UniformLora]:
    """Return the adapters with `lora_scale` applied, by expert, all with the same rank and alpha.

    The scale is multiplied into B: engines take the matrices as inputs, so it does not affect their keys.

    Raises:
        ConfigError: an adapter cannot be read, is for another model, contains differences of whole parameters, changes
            a convolution, or is not finite with this scale.
    """
    adapters = read_adapters(path, family_of(settings.model).layer_path, settings.expert)
    check_adapters(settings.model, adapters)
    return {expert: _scaled(lora, settings) for expert, lora in uniform_loras(adapters).items()}


def _scaled(lora: UniformLora, settings: SampleSettings) -> UniformLora:
    scaled = {layer: (down, settings.lora_scale * up.float()) for layer, (down, up) in lora.layers.items()}
    for layer, (_, up) in scaled.items():
        if not bool(up.isfinite().all()):
            raise ConfigError(
                f"{settings.adapter}: with a lora_scale of {settings.lora_scale:g}, the LoRA of {layer} is not finite"
            )
    return replace(lora, layers=scaled)


def load_for_sampling(settings: SampleSettings, adapters: Mapping[ExpertName, UniformLora]) -> TrainingModule:
    """Load the model with `adapters`, all of one rank and alpha, on its experts; without adapters, with a zero LoRA."""
    lora = LoraSettings(rank=2)
    if adapters:
        one = next(iter(adapters.values()))
        targets = sorted({layer for adapter in adapters.values() for layer in adapter.target_modules})
        experts: Experts = "both" if len(adapters) > 1 else next(iter(adapters))
        lora = LoraSettings(rank=one.rank, alpha=one.alpha, target_modules=tuple(targets), experts=experts)
    module = TrainingModule.from_pretrained(
        settings.model,
        engines=settings.engines,
        plan=parse_plan(settings.plan),
        strict=settings.strict,
        dtype=parse_precision(settings.precision),
        device=resolve_device(settings.device),
        base_adapters=settings.base_adapters,
        quantization=settings.quantization,
        text_encoder_quantization=settings.text_encoder_quantization,
        offload_blocks=settings.offload_blocks,
        num_inference_steps=settings.num_inference_steps,
        grad_start_step=0,
        grad_end_step=settings.num_inference_steps - 1,
        shift=settings.shift,
        cache_bytes=0,
        lora=lora.model_dump(),
    )
    for adapter, expert in zip(adapters.values(), module.trained_experts if adapters else (), strict=True):
        copy_adapter(expert.network, fill_up(adapter, expert.network))
    return module


@torch.no_grad()
def _sample(module: TrainingModule, settings: SampleSettings, picture: Tensor | None) -> SampledClip:
    size = _size(settings, picture, module.model.geometry.spatial_multiple)
    frame = torch.zeros(1, 3, *size) if picture is None else crop_to(picture, size)
    video = frame.expand(settings.num_frames, -1, -1, -1)[None]
    conditioning = module.forward_preprocess({"prompt": [settings.prompt], "video": video})
    _release_encoders(module)
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randn(1, *conditioning.latent_shape, generator=generator)
    videos = module.generate(conditioning, noise.to(conditioning.device))
    if picture is None:
        return SampledClip(videos[0].cpu(), None, None, module.runtime.plan)
    ((_, score),) = module.score(videos, conditioning)
    detection_rate = score.metrics["detection_rate"].item()
    return SampledClip(videos[0].cpu(), score.score.item(), detection_rate, module.runtime.plan)


def _release_encoders(module: TrainingModule) -> None:
    """Release the weights and engines of text, image and VAE encoder, which only the conditions of the clip need."""
    denoisers = {expert.stage for expert in module.model.experts}
    encoders = [name for name, stage in module.stages.items() if stage.weights is not None and name not in denoisers]
    if encoders:
        module.runtime.release_weights(*encoders, engines=True)
        free_memory()


def _size(settings: SampleSettings, picture: Tensor | None, multiple: int) -> tuple[int, int]:
    """Return (height, width) of the clip."""
    if settings.height is not None and settings.width is not None:
        for name, side in (("height", settings.height), ("width", settings.width)):
            if side < multiple or side % multiple:
                raise ConfigError(f"{name} must be a multiple of {multiple} for {settings.model}, not {side}")
        return settings.height, settings.width
    assert picture is not None
    return size_within(picture.shape[-2], picture.shape[-1], settings.max_pixels, multiple)
