"""What each stage of a model needs of memory, measured on tensors that have shapes and no content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frostline.config import GradientCheckpointing, LoraSettings
from frostline.models.checkpoints.model_spec import Skeleton
from frostline.models.lazy_weights import VAE_ENCODER
from frostline.models.lora.inject import inject_lora, lora_parameters
from frostline.models.wan.components import WanComponents
from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.image import ImageEncoder
from frostline.models.wan.text import TextEncoder
from frostline.models.wan.vae import decode_latents, decoder_chunks
from frostline.models.wan.video_shape import CLIP_FEATURE, MASK_CHANNELS, VideoShape, latent_grid
from frostline.rewards.reward import LiveNetwork, Reward
from frostline.train.memory.recompute import decode_recomputed, recomputed
from frostline.train.memory.tracker import MemoryTracker, tensors_of

# The first latent frame, and the first with a cache, are decoded in ways of their own; the rest alike.
_FEW = 4


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
    """What a model needs of memory.

    weights: bytes by stage. stages: by name, measured with a kind of gradient checkpointing. adapter: bytes of the
    LoRA. largest_block: bytes of the largest block of the denoiser.
    """

    weights: Mapping[str, int]
    stages: Callable[[GradientCheckpointing], dict[str, Footprint]]
    adapter: int
    largest_block: int


def measure_model(skeleton: Skeleton, shape: VideoShape, dtype: torch.dtype, lora: LoraSettings) -> ModelFootprint:
    """Run stages of a model on fake tensors: no weights are read, nothing of size is allocated.

    Counted are tensors, as `MemoryTracker` does. The frozen stages run once, the live ones for each kind that is asked
    for.
    """
    modules: dict[str, Any] = {field: _build(skeleton, field, dtype) for field in skeleton.networks}
    inject_lora(modules["denoiser"], lora.rank, lora.alpha, lora.target_modules)
    # What is computed from weights as a module is built cannot be faked before it is there.
    denoiser, text_encoder, vae = Denoiser(modules["denoiser"]), TextEncoder(modules["text_encoder"]), modules["vae"]
    image_encoder = ImageEncoder(modules["image_encoder"]).to(dtype) if "image_encoder" in modules else None
    faked = [module for module in (denoiser, text_encoder, vae, image_encoder) if module is not None]
    frozen: dict[str, Footprint] = {}
    with _faked(*faked):
        make = _Inputs(vae, denoiser, skeleton.text_length, shape, dtype)
        frozen["text_encoder"] = _measure(text_encoder, text_encoder, make.tokens())
        if image_encoder is not None:
            frozen["image_encoder"] = _measure(image_encoder, image_encoder, make.image())
        encoding = _measure(vae, lambda video: vae.model.encode(video, vae.scale), make.video())
        frozen["vae_encoder"] = replace(encoding, weights=_encoder_bytes(vae))

    weights = {name: footprint.weights for name, footprint in frozen.items()}
    weights |= {"denoiser": _frozen_bytes(denoiser), "vae_decoder": _bytes(vae.parameters()) - _encoder_bytes(vae)}
    if (expert := modules.get("denoiser_high_noise")) is not None:
        weights["denoiser_high_noise"] = _bytes(expert.parameters())

    def stages(kind: GradientCheckpointing) -> dict[str, Footprint]:
        with _faked(*faked):
            live = _live_stages(vae, denoiser, _Inputs(vae, denoiser, skeleton.text_length, shape, dtype), kind)
        measured = frozen | live
        if "denoiser_high_noise" in weights:
            peak = live["denoiser"].frozen_peak
            measured["denoiser_high_noise"] = Footprint(weights["denoiser_high_noise"], peak)
        return measured

    blocks = cast("list[nn.Module]", denoiser.model.blocks)
    return ModelFootprint(
        weights,
        stages,
        adapter=_bytes(lora_parameters(denoiser.model).values()),
        largest_block=max(_frozen_bytes(block) for block in blocks),
    )


def measure_live_stages(
    components: WanComponents, shape: VideoShape, gradient_checkpointing: GradientCheckpointing
) -> dict[str, Footprint]:
    """`denoiser` and `vae_decoder` of a loaded model with its LoRA; its tensors are set aside for the while."""
    vae, denoiser = components.vae, Denoiser(components.denoiser)
    dtype = components.dtype
    with _faked(vae, denoiser):
        make = _Inputs(vae, denoiser, components.text_length, shape, dtype)
        return _live_stages(vae, denoiser, make, gradient_checkpointing)


def measure_rewards(rewards: Iterable[Reward], shape: VideoShape) -> dict[str, Footprint]:
    """What rewards compute with gradient in a step: each use once, on the networks' own weights, then all of them."""
    return {live.stage: _of_uses(live) for reward in rewards for live in reward.live_networks(shape)}


def _of_uses(live: LiveNetwork) -> Footprint:
    one = _measure(live.module, live.module, live.inputs, live=True)
    kept, peaks = live.uses * one.kept, (live.uses * one.forward_peak, live.uses * one.backward_peak)
    return Footprint(_bytes(tensors_of(live.module)), live.uses * one.frozen_peak, kept, *peaks)


class _Inputs:
    """Fake inputs of each stage."""

    def __init__(self, vae: Any, denoiser: Denoiser, text_length: int, shape: VideoShape, dtype: torch.dtype) -> None:
        self.vae, self.denoiser = vae, denoiser
        self.text_length, self.shape, self.dtype = text_length, shape, dtype

    def tokens(self) -> tuple[Tensor, ...]:
        """ids and mask."""
        size = (self.shape.batch_size, self.text_length)
        return torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.int64)

    def image(self) -> tuple[Tensor, ...]:
        return (torch.zeros(self.shape.batch_size, 3, self.shape.height, self.shape.width, dtype=self.dtype),)

    def video(self) -> tuple[Tensor, ...]:
        """What is encoded: all frames, or where the first is pinned that one."""
        frames = 1 if self.denoiser.pins_first_frame else self.shape.num_frames
        size = (self.shape.batch_size, 3, frames, self.shape.height, self.shape.width)
        return (torch.zeros(size, dtype=self.dtype),)

    def latents(self) -> tuple[Tensor, ...]:
        """latents, timestep, context, and the conditions that the denoiser takes."""
        shape, channels, model = self.shape, self.vae.model.z_dim, cast(Any, self.denoiser.model)
        grid = latent_grid(shape.num_frames, shape.height, shape.width, self.vae.upsampling_factor)
        width = model.text_embedding[0].in_features
        context = torch.zeros(shape.batch_size, self.text_length, width, dtype=self.dtype)
        latents = torch.zeros(shape.batch_size, channels, *grid, dtype=self.dtype)
        inputs = [latents, torch.zeros(shape.batch_size), context]
        if model.in_dim > channels:
            inputs.append(torch.zeros(shape.batch_size, channels + MASK_CHANNELS, *grid, dtype=self.dtype))
        if model.has_image_input:
            inputs.append(torch.zeros(shape.batch_size, *CLIP_FEATURE, dtype=self.dtype))
        return tuple(inputs)


def _build(skeleton: Skeleton, field: str, dtype: torch.dtype) -> nn.Module:
    return skeleton.build(field).eval().requires_grad_(False).to(dtype)


@contextmanager
def _faked(*modules: nn.Module) -> Iterator[None]:
    """Within the block no tensor has content, those of the modules neither; these are what they were afterwards."""
    # The mode registers a stand-in for GPUs. Had autograd not started by then, it would start threads for them, which a
    # forked process cannot.
    torch.ones((), requires_grad=True).backward()
    scales: list[tuple[Any, list[Tensor]]] = [
        (module, cast(Any, module.scale)) for module in modules if isinstance(getattr(module, "scale", None), list)
    ]
    before = [(part, dict(part._parameters), dict(part._buffers)) for module in modules for part in module.modules()]
    try:
        for module, scale in scales:  # statistics that diffsynth's VAE keeps outside of its buffers
            module.scale = [tensor.cpu() for tensor in scale]
        # Anomaly detection looks at values, and here are none.
        with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.set_detect_anomaly(False):
            for part, parameters, buffers in before:
                for name, parameter in parameters.items():
                    if parameter is not None:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                        part._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                for name, buffer in buffers.items():
                    if buffer is not None:
                        part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
            yield
    finally:
        for module, scale in scales:
            module.scale = scale
        for part, parameters, buffers in before:
            part._parameters.update(parameters)
            part._buffers.update(buffers)


def _live_stages(
    vae: Any, denoiser: Denoiser, make: _Inputs, gradient_checkpointing: GradientCheckpointing
) -> dict[str, Footprint]:
    inputs, blocks = make.latents(), cast("nn.ModuleList", denoiser.model.blocks)
    latents = inputs[0]

    def tail(count: int) -> Footprint:
        with _only(denoiser.model, blocks[:count]):
            return _measure(denoiser, _tail(denoiser, gradient_checkpointing), inputs, live=True)

    def decoding(frames: int) -> Footprint:
        return _measure(vae, _decoder(vae, gradient_checkpointing), (latents[:, :, :frames],), live=True)

    frames = latents.shape[2]
    # Without checkpointing the decoder has the whole clip at once.
    decoder = decoding(frames) if gradient_checkpointing == "none" else _of_many(decoding, frames)
    return {
        "denoiser": replace(_of_many(tail, len(blocks)), weights=_frozen_bytes(denoiser)),
        "vae_decoder": replace(decoder, weights=_bytes(vae.parameters()) - _encoder_bytes(vae)),
    }


def _of_many(measure: Callable[[int], Footprint], count: int) -> Footprint:
    """`measure(count)` of a stage that goes through so many blocks or chunks: each beyond the first few adds alike."""
    if count <= _FEW:
        return measure(count)
    fewer, few = astuple(measure(_FEW - 1)), astuple(measure(_FEW))
    return Footprint(*(last + (count - _FEW) * (last - before) for before, last in zip(fewer, few, strict=True)))


@contextmanager
def _only(model: Any, blocks: nn.ModuleList) -> Iterator[None]:
    """Within the block the model has these blocks alone."""
    before = model.blocks
    model.blocks = blocks
    try:
        yield
    finally:
        model.blocks = before


def _tail(denoiser: Denoiser, gradient_checkpointing: GradientCheckpointing) -> Callable[..., Tensor]:
    """A step of it, as `Sampler` does it."""
    names = ("latents", "timestep", "context", "y", "clip_feature")
    adapter = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    # Under "full" too, where it is backward that runs the blocks.
    denoiser.checkpoint_blocks = gradient_checkpointing != "none"

    def in_torch(**inputs: Tensor) -> dict[str, Tensor]:
        return {"velocity": denoiser(**inputs)}

    def step(*inputs: Tensor | None) -> Tensor:
        given = {name: tensor for name, tensor in zip(names, inputs, strict=False) if tensor is not None}
        whole = gradient_checkpointing == "full"
        return (recomputed(in_torch, in_torch, given, adapter) if whole else in_torch(**given))["velocity"]

    return step


def _decoder(vae: Any, gradient_checkpointing: GradientCheckpointing) -> Callable[[Tensor], Tensor]:
    """As `WanTrainingModule` decodes."""
    chunks, whole = decoder_chunks(vae), gradient_checkpointing == "full"

    def decode(latents: Tensor) -> Tensor:
        if gradient_checkpointing == "none" or not torch.is_grad_enabled():
            return decode_latents(vae, latents).float()
        return decode_recomputed(chunks, chunks, latents, whole).float()

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


def _encoder_bytes(vae: nn.Module) -> int:
    return _bytes(p for name, p in vae.named_parameters() if name.startswith(VAE_ENCODER))


def _frozen_bytes(module: nn.Module) -> int:
    return _bytes(p for p in module.parameters() if not p.requires_grad)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
