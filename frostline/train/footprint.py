"""What each stage of a model needs of memory, measured on tensors that have shapes and no content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from frostline.config import LoraSettings
from frostline.models.denoiser import Denoiser, GradientCheckpointing
from frostline.models.geometry import TEMPORAL_STRIDE
from frostline.models.image import ImageEncoder
from frostline.models.lora import inject_lora, lora_parameters
from frostline.models.networks import build_network
from frostline.models.skeleton import Skeleton
from frostline.models.text import TextEncoder
from frostline.models.vae import decode_latents
from frostline.train.tracking import MemoryTracker, tensors_of

_CLIP_FEATURE = (257, 1280)
_MASK_CHANNELS = 4
_VAE_ENCODER = ("model.encoder.", "model.conv1.")


@dataclass(frozen=True)
class VideoShape:
    """What a step computes on: samples, frames (4k + 1), pixels."""

    batch_size: int
    num_frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of one stage, beside its inputs.

    weights: of its frozen parameters. frozen_peak: the most that a use without gradient holds. Of one live use, for the
    stages that have one: kept is what stays until backward, forward_peak and backward_peak the most that are held in
    each, what is kept included.
    """

    weights: int
    frozen_peak: int
    kept: int = 0
    forward_peak: int = 0
    backward_peak: int = 0


@dataclass(frozen=True)
class ModelFootprint:
    """stages: by name. adapter: bytes of the LoRA. largest_block: bytes of the largest block of the denoiser."""

    stages: Mapping[str, Footprint]
    adapter: int
    largest_block: int


def measure_model(
    skeleton: Skeleton,
    shape: VideoShape,
    dtype: torch.dtype,
    lora: LoraSettings,
    gradient_checkpointing: GradientCheckpointing,
) -> ModelFootprint:
    """Run every stage of a model once on fake tensors: no weights are read, nothing of size is allocated.

    Counted are tensors, as `MemoryTracker` does.
    """
    modules = {field: _build(skeleton, field, dtype) for field in skeleton.networks}
    inject_lora(modules["denoiser"], lora.rank, lora.alpha, lora.target_modules)
    # What is computed from weights as a module is built cannot be faked before it is there.
    denoiser = Denoiser(cast(Any, modules["denoiser"]))
    denoiser.gradient_checkpointing = gradient_checkpointing
    stages: dict[str, Footprint] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        make = _Inputs(skeleton, modules, shape, dtype)
        text_encoder = _fake(TextEncoder(cast(Any, modules["text_encoder"])))
        stages["text_encoder"] = _measure(text_encoder, text_encoder, make.tokens())
        if "image_encoder" in modules:
            image_encoder = _fake(ImageEncoder(cast(Any, modules["image_encoder"])).to(dtype))
            stages["image_encoder"] = _measure(image_encoder, image_encoder, make.image())
        vae: Any = _fake(modules["vae"])
        weights = {name: _bytes([p]) for name, p in vae.named_parameters()}
        in_encoder = sum(size for name, size in weights.items() if name.startswith(_VAE_ENCODER))
        encoding = _measure(vae, lambda video: vae.model.encode(video, vae.scale), make.video())
        stages["vae_encoder"] = Footprint(in_encoder, encoding.frozen_peak)
        denoiser = cast(Denoiser, _fake(denoiser))
        frozen_bytes = _bytes(p for p in denoiser.parameters() if not p.requires_grad)
        inputs = make.latents()
        live = _measure(denoiser, denoiser, inputs, live=True)
        if "denoiser_high_noise" in modules:
            expert_bytes = _bytes(modules["denoiser_high_noise"].parameters())
            stages["denoiser_high_noise"] = Footprint(expert_bytes, live.frozen_peak)
        stages["denoiser"] = Footprint(frozen_bytes, live.frozen_peak, live.kept, live.forward_peak, live.backward_peak)
        decode = _decoder(vae, gradient_checkpointing)
        decoding = _measure(vae, decode, (inputs[0],), live=True)
        stages["vae_decoder"] = Footprint(
            sum(weights.values()) - in_encoder,
            decoding.frozen_peak,
            decoding.kept,
            decoding.forward_peak,
            decoding.backward_peak,
        )
    blocks = cast("list[nn.Module]", denoiser.model.blocks)
    return ModelFootprint(
        stages,
        adapter=_bytes(lora_parameters(denoiser.model).values()),
        largest_block=max(_bytes(p for p in block.parameters() if not p.requires_grad) for block in blocks),
    )


def measure_embedder(embedder: nn.Module, faces: int) -> Footprint:
    """The face embedder on so many faces, each kept until backward; computed for one, on the embedder's own weights."""
    side = cast(int, embedder.image_size)
    one = _measure(embedder, embedder, (torch.zeros(1, 3, side, side),), live=True)
    kept, peaks = faces * one.kept, (faces * one.forward_peak, faces * one.backward_peak)
    return Footprint(_bytes(tensors_of(embedder)), faces * one.frozen_peak, kept, *peaks)


class _Inputs:
    """Fake inputs of each stage."""

    def __init__(
        self, skeleton: Skeleton, modules: Mapping[str, nn.Module], shape: VideoShape, dtype: torch.dtype
    ) -> None:
        self.skeleton, self.shape, self.dtype = skeleton, shape, dtype
        self.vae: Any = modules["vae"]
        self.denoiser: Any = modules["denoiser"]

    def tokens(self) -> tuple[Tensor, ...]:
        """ids and mask."""
        size = (self.shape.batch_size, self.skeleton.text_length)
        return torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.int64)

    def image(self) -> tuple[Tensor, ...]:
        return (torch.zeros(self.shape.batch_size, 3, self.shape.height, self.shape.width, dtype=self.dtype),)

    def video(self) -> tuple[Tensor, ...]:
        """What is encoded: all frames, or where the first is pinned that one."""
        frames = 1 if self.denoiser.fuse_vae_embedding_in_latents else self.shape.num_frames
        size = (self.shape.batch_size, 3, frames, self.shape.height, self.shape.width)
        return (torch.zeros(size, dtype=self.dtype),)

    def latents(self) -> tuple[Tensor, ...]:
        """latents, timestep, context, and the conditions that the denoiser takes."""
        shape, channels, stride = self.shape, self.vae.model.z_dim, self.vae.upsampling_factor
        grid = ((shape.num_frames - 1) // TEMPORAL_STRIDE + 1, shape.height // stride, shape.width // stride)
        width = self.skeleton.networks["text_encoder"][1]["dim"]
        context = torch.zeros(shape.batch_size, self.skeleton.text_length, width, dtype=self.dtype)
        latents = torch.zeros(shape.batch_size, channels, *grid, dtype=self.dtype)
        inputs = [latents, torch.zeros(shape.batch_size), context]
        if self.denoiser.in_dim > channels:
            inputs.append(torch.zeros(shape.batch_size, channels + _MASK_CHANNELS, *grid, dtype=self.dtype))
        if self.denoiser.has_image_input:
            inputs.append(torch.zeros(shape.batch_size, *_CLIP_FEATURE, dtype=self.dtype))
        return tuple(inputs)


def _build(skeleton: Skeleton, field: str, dtype: torch.dtype) -> nn.Module:
    from diffsynth.core.vram.initialization import skip_model_initialization

    part, arguments = skeleton.networks[field]
    with skip_model_initialization():
        module = build_network(part, arguments)
    return module.eval().requires_grad_(False).to(dtype)


def _fake(module: nn.Module) -> nn.Module:
    """Within a `FakeTensorMode`: parameters and buffers on a device that computes, still without content."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            part._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return module


def _decoder(vae: Any, gradient_checkpointing: GradientCheckpointing) -> Callable[[Tensor], Tensor]:
    """As `WanTrainingModule` decodes."""

    def decode(latents: Tensor) -> Tensor:
        by_frame = gradient_checkpointing != "none"
        if gradient_checkpointing == "full" and torch.is_grad_enabled():
            video = checkpoint(decode_latents, vae, latents, by_frame, use_reentrant=False)
            assert isinstance(video, Tensor)
            return video.float()
        return decode_latents(vae, latents, by_frame).float()

    return decode


def _measure(
    module: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], live: bool = False
) -> Footprint:
    if live:
        inputs = (inputs[0].detach().requires_grad_(), *inputs[1:])
    with MemoryTracker([*tensors_of(module), *inputs]) as tracker:
        with torch.no_grad():
            result = call(*inputs)
        del result
        frozen_peak = tracker.peak
        if not live:
            return Footprint(_bytes(module.parameters()), frozen_peak)
        tracker.restart()
        result = call(*inputs)
        kept, forward_peak = tracker.live, tracker.peak
        tracker.restart()
        result.sum().backward()
        return Footprint(_bytes(module.parameters()), frozen_peak, kept, forward_peak, tracker.peak)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
