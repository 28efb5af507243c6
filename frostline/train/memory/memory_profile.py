"""Measure the memory of each stage of a model on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from frostline.config import GradientCheckpointing
from frostline.models.lora.inject import lora_parameters
from frostline.models.meta_tensors import on_meta
from frostline.models.quantization.linear import dequantised_bytes
from frostline.models.video_shape import VideoShape
from frostline.rewards.active import JUDGE, label_of
from frostline.rewards.build import networks_of
from frostline.rewards.config import RewardConfig
from frostline.rewards.reward import LiveNetwork, Reward
from frostline.runtime.stage import Tensors
from frostline.stages.provider import Use
from frostline.stages.video_model import Decoder, DenoiserModule, Expert, VideoModel
from frostline.train.memory.recompute import Networks, decode_recomputed, recomputed
from frostline.train.memory.tracker import MemoryTracker, tensors_of

# A decoder processes the first latent frame and the first chunk with a cache differently; the other chunks are alike.
_FEW_CHUNKS = 4
_FEW_BLOCKS = 3


@dataclass(frozen=True)
class Footprint:
    """Memory of one stage in bytes, without its inputs.

    Attributes:
        weights: size of its frozen parameters.
        frozen_peak: peak of a use without a gradient.
        kept: memory that a live use keeps until backward; 0 for a stage without live uses.
        forward_peak, backward_peak: peaks of a live use in forward and in backward, including `kept`.
    """

    weights: int
    frozen_peak: int
    kept: int = 0
    forward_peak: int = 0
    backward_peak: int = 0


@dataclass(frozen=True)
class Weights:
    """Size of a model's parameters in bytes.

    Attributes:
        stages: size of each stage.
        dequantised: size of each stage if weights in 8 or 4 bits are dequantised.
        adapter: size of all LoRAs together.
        blocks: for each denoiser, the size of the frozen parameters of each block.
        largest_blocks: for each denoiser that a gradient flows through, the size of its largest block.
    """

    stages: Mapping[str, int]
    dequantised: Mapping[str, int]
    adapter: int
    blocks: Mapping[str, tuple[int, ...]]
    largest_blocks: Mapping[str, int]

    @classmethod
    def of(cls, model: VideoModel) -> Weights:
        """Measure the parameters of a model, which may be on the meta device."""
        blocks = {each.stage: tuple(_frozen_bytes(block) for block in each.module.blocks) for each in model.experts}
        more = {id(p): size for module in model.modules() for p, size in dequantised_bytes(module)}
        return cls(
            _weights(model),
            dequantised={
                stage: sum(more.get(id(parameter), parameter.nbytes) for parameter in parameters)
                for stage, parameters in model.stage_parameters().items()
            },
            adapter=sum(_bytes(lora_parameters(each.network).values()) for each in model.experts),
            blocks=blocks,
            largest_blocks={each.stage: max(blocks[each.stage]) for each in _live_experts(model)},
        )


def measure_frozen_stages(model: VideoModel, shape: VideoShape) -> dict[str, Footprint]:
    """Measure the frozen stages except the denoisers by running each of them once on meta tensors.

    Only tensors are counted, see `MemoryTracker`; nothing is allocated.

    Args:
        model: its weights need not be in memory.
    """
    weights = _weights(model)
    with without_data(*model.modules()):
        calls = model.frozen_calls(shape)
        frozen = {stage: _measure(each.module, each.call, each.inputs) for stage, each in calls.items()}
    return {stage: replace(footprint, weights=weights[stage]) for stage, footprint in frozen.items()}


def _weights(model: VideoModel) -> dict[str, int]:
    return {stage: _bytes(parameters) for stage, parameters in model.stage_parameters().items()}


def _live_experts(model: VideoModel) -> list[Expert]:
    """Return the experts that a gradient can flow through: to their own LoRA, or to the LoRA of an earlier expert."""
    *others, last = model.experts
    return [*(expert for expert in others if expert.trained), last]


def measure_live_stages(
    model: VideoModel, shape: VideoShape, gradient_checkpointing: GradientCheckpointing, window: int | None = None
) -> dict[str, Footprint]:
    """Measure the denoisers and the decoder on meta tensors, which replace the model's tensors during this time.

    Args:
        window: number of latent frames that a step decodes with gradient; None means all of them.
    """
    denoisers = measure_denoisers(model, shape, gradient_checkpointing)
    return denoisers | measure_decoder(model, shape, gradient_checkpointing, window)


def measure_denoisers(
    model: VideoModel, shape: VideoShape, gradient_checkpointing: GradientCheckpointing
) -> dict[str, Footprint]:
    """Measure all denoisers.

    Only those with a gradient are run; the others have the frozen peak of the last one, as they differ in weights only.
    """
    weights, live = _weights(model), {}
    with without_data(*model.modules()):
        inputs = model.denoiser_sample(shape)
        names, tensors = [*inputs], tuple(inputs.values())

        def tail(denoiser: DenoiserModule, count: int) -> Footprint:
            with denoiser.first_blocks(count):
                step = _tail(denoiser, names, gradient_checkpointing)
                return _measure(cast(nn.Module, denoiser), step, tensors, live=True)

        for each in _live_experts(model):
            footprint = _of_many(partial(tail, each.module), len(each.module.blocks), _FEW_BLOCKS)
            live[each.stage] = replace(footprint, weights=weights[each.stage])
    peak = live[model.experts[-1].stage].frozen_peak
    return {each.stage: live.get(each.stage, Footprint(weights[each.stage], peak)) for each in model.experts}


def measure_decoder(
    model: VideoModel, shape: VideoShape, gradient_checkpointing: GradientCheckpointing, window: int | None = None
) -> dict[str, Footprint]:
    """Measure the decoder; see `measure_live_stages`."""
    decoder = model.decoder()
    with without_data(*model.modules()):
        latents = model.denoiser_sample(shape)["latents"].to(decoder.dtype)
        frames = latents.shape[2]
        caches, held = None, 0
        if window is not None and window < frames:
            frames = window
            with torch.no_grad():
                caches = decoder.caches(decoder.networks, latents[:, :, :1])
            held = _bytes(caches.values())

        def decoding(frames: int) -> Footprint:
            decode = _decode(decoder, gradient_checkpointing, caches)
            return _measure(nn.ModuleList(model.modules()), decode, (latents[:, :, :frames],), live=True)

        decoded = _of_many(decoding, frames, _FEW_CHUNKS)
    return {
        decoder.stage: replace(
            decoded,
            weights=_weights(model)[decoder.stage],
            kept=decoded.kept + held,
            forward_peak=decoded.forward_peak + held,
            backward_peak=decoded.backward_peak + held,
        )
    }


def measure_rewards(rewards: Iterable[Reward], shape: VideoShape) -> dict[str, Footprint]:
    """Measure the networks that rewards run with a gradient in a step.

    One use of each network is measured with its real weights, and multiplied by the number of uses. Networks with the
    same name, of one reward or of two, are numbered, and each is counted. The other networks that a reward keeps on the
    device, such as a text tower or a face detector, are one entry `NAME (frozen)` with weights only.
    """
    found: dict[str, Footprint] = {}

    def add(stage: str, footprint: Footprint) -> None:
        taken = sum(name == stage or name.startswith(f"{stage} #") for name in found)
        found[f"{stage} #{taken + 1}" if taken else stage] = footprint

    for reward in rewards:
        frozen = _tensors(networks_of(reward))
        for live in reward.live_networks(shape):
            add(live.stage, _of_uses(live))
            frozen = {key: tensor for key, tensor in frozen.items() if key not in _tensors([live.module])}
        if frozen:
            add(f"{reward.name} (frozen)", Footprint(_bytes(frozen.values()), 0))
    return found


def judge_bytes(judge: Reward, config: RewardConfig) -> tuple[str, int]:
    """Return the name of a judge and the bytes of its networks, which stay on the device for the next validation."""
    return f"{JUDGE}{label_of(judge, config)}", _bytes(_tensors(networks_of(judge)).values())


def live_uses(of_rewards: Mapping[str, Footprint], clips: int) -> list[Use]:
    """Return the uses that `measure_rewards` measured, in a step that scores `clips` clips for each sample."""
    return [Use(stage, True, clips, "reward") for stage, footprint in of_rewards.items() if footprint.forward_peak]


def _of_uses(live: LiveNetwork) -> Footprint:
    one = _measure(live.module, live.module, live.inputs, live=True)
    kept, peaks = live.uses * one.kept, (live.uses * one.forward_peak, live.uses * one.backward_peak)
    return Footprint(_bytes(tensors_of(live.module)), live.uses * one.frozen_peak, kept, *peaks)


@contextmanager
def without_data(*modules: nn.Module) -> Iterator[None]:
    """Run the block on the meta device, with meta tensors in `modules`, whose tensors are restored afterwards."""
    # Statistics that a VAE keeps outside of its buffers.
    scales: list[tuple[Any, list[Tensor]]] = [
        (module, cast(Any, module.scale)) for module in modules if isinstance(getattr(module, "scale", None), list)
    ]
    try:
        for module, scale in scales:
            module.scale = [torch.empty_like(tensor, device="meta") for tensor in scale]
        with on_meta(*modules):
            yield
    finally:
        for module, scale in scales:
            module.scale = scale


def _of_many(measure: Callable[[int], Footprint], count: int, few: int) -> Footprint:
    """Return `measure(count)` of a stage with `count` blocks or chunks; those after `few` add equal amounts."""
    if count <= few:
        return measure(count)
    before, last = astuple(measure(few - 1)), astuple(measure(few))
    return Footprint(*(this + (count - few) * (this - other) for other, this in zip(before, last, strict=True)))


def _tail(
    denoiser: DenoiserModule, names: list[str], gradient_checkpointing: GradientCheckpointing
) -> Callable[..., Tensor]:
    """Return a function that runs one live step of the denoiser like `Sampler`."""
    adapter = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    # Also with "full", where backward runs the blocks with a graph.
    denoiser.checkpoint_blocks = gradient_checkpointing != "none"

    def in_torch(**inputs: Tensor) -> dict[str, Tensor]:
        return {"velocity": denoiser(**inputs)}

    def step(*inputs: Tensor) -> Tensor:
        given = dict(zip(names, inputs, strict=True))
        whole = gradient_checkpointing == "full"
        return (recomputed(in_torch, in_torch, given, adapter) if whole else in_torch(**given))["velocity"]

    return step


def _decode(
    decoder: Decoder, gradient_checkpointing: GradientCheckpointing, caches: Tensors | None
) -> Callable[[Tensor], Tensor]:
    """Return a function that decodes like a training step: after the frames of `caches`, or from the first frame."""
    networks, whole = decoder.networks, gradient_checkpointing == "full"

    def assemble(on: Networks, latents: Tensor) -> Tensor:
        return decoder.assemble(on, latents, caches)

    def decode(latents: Tensor) -> Tensor:
        if gradient_checkpointing == "none" or not torch.is_grad_enabled():
            return (decoder.whole(latents) if caches is None else decoder.go_on(latents, caches)).float()
        return decode_recomputed(assemble, networks, networks, latents, whole).float()

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


def _tensors(modules: Iterable[nn.Module]) -> dict[int, Tensor]:
    """Return the parameters and buffers of modules by `id`, without duplicates."""
    return {id(tensor): tensor for module in modules for tensor in tensors_of(module)}


def _frozen_bytes(module: nn.Module) -> int:
    return _bytes(p for p in module.parameters() if not p.requires_grad)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
