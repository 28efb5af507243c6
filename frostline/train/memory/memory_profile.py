"""What each stage of a model needs of memory, measured on tensors that have shapes and no content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frostline.config import GradientCheckpointing
from frostline.models.lora.inject import lora_parameters
from frostline.models.video_shape import VideoShape
from frostline.rewards.reward import LiveNetwork, Reward
from frostline.stages.provider import Use
from frostline.stages.video_model import Decoder, DenoiserModule, VideoModel
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


def measure_model(model: VideoModel, shape: VideoShape) -> ModelFootprint:
    """Run stages of a model without weights on fake tensors: nothing of size is allocated.

    Counted are tensors, as `MemoryTracker` does. The frozen stages run once, the live ones for each kind that is asked
    for.

    Args:
        model: of `Family.empty_model`.
    """
    weights = {stage: _bytes(parameters) for stage, parameters in model.stage_parameters().items()}
    with _faked(*model.modules()):
        calls = model.frozen_calls(shape)
        frozen = {stage: _measure(each.module, each.call, each.inputs) for stage, each in calls.items()}
    frozen = {stage: replace(footprint, weights=weights[stage]) for stage, footprint in frozen.items()}

    def stages(kind: GradientCheckpointing) -> dict[str, Footprint]:
        live = measure_live_stages(model, shape, kind)
        # Experts are alike but for their weights.
        peak = live[model.experts[-1].stage].frozen_peak
        others = {each.stage: Footprint(weights[each.stage], peak) for each in model.experts[:-1]}
        return frozen | live | others

    trained = model.experts[-1]
    return ModelFootprint(
        weights,
        stages,
        adapter=_bytes(lora_parameters(trained.network).values()),
        largest_block=max(_frozen_bytes(block) for block in trained.module.blocks),
    )


def measure_live_stages(
    model: VideoModel, shape: VideoShape, gradient_checkpointing: GradientCheckpointing
) -> dict[str, Footprint]:
    """The denoiser with the LoRA and the decoder of a model; its tensors are set aside for the while."""
    expert, decoder = model.experts[-1], model.decoder()
    denoiser = expert.module
    weights = {stage: _bytes(parameters) for stage, parameters in model.stage_parameters().items()}
    with _faked(*model.modules()):
        inputs = model.denoiser_sample(shape)
        names, tensors = [*inputs], tuple(inputs.values())
        latents = inputs["latents"].to(decoder.dtype)

        def tail(count: int) -> Footprint:
            with denoiser.first_blocks(count):
                step = _tail(denoiser, names, gradient_checkpointing)
                return _measure(cast(nn.Module, denoiser), step, tensors, live=True)

        def decoding(frames: int) -> Footprint:
            decode = _decode(decoder, gradient_checkpointing)
            return _measure(nn.ModuleList(model.modules()), decode, (latents[:, :, :frames],), live=True)

        frames = latents.shape[2]
        # Without checkpointing the decoder has the whole clip at once.
        decoded = decoding(frames) if gradient_checkpointing == "none" else _of_many(decoding, frames)
        return {
            expert.stage: replace(_of_many(tail, len(denoiser.blocks)), weights=weights[expert.stage]),
            decoder.stage: replace(decoded, weights=weights[decoder.stage]),
        }


def measure_rewards(rewards: Iterable[Reward], shape: VideoShape) -> dict[str, Footprint]:
    """What rewards compute with gradient in a step: each use once, on the networks' own weights, then all of them.

    Networks that go by one name, of one reward or of two, are numbered: each counts.
    """
    found: dict[str, Footprint] = {}
    for live in (live for reward in rewards for live in reward.live_networks(shape)):
        taken = sum(name == live.stage or name.startswith(f"{live.stage} #") for name in found)
        found[f"{live.stage} #{taken + 1}" if taken else live.stage] = _of_uses(live)
    return found


def live_uses(of_rewards: Mapping[str, Footprint]) -> list[Use]:
    """Return the uses of what `measure_rewards` measured."""
    return [Use(stage, live=True, count=1, phase="reward") for stage in of_rewards]


def _of_uses(live: LiveNetwork) -> Footprint:
    one = _measure(live.module, live.module, live.inputs, live=True)
    kept, peaks = live.uses * one.kept, (live.uses * one.forward_peak, live.uses * one.backward_peak)
    return Footprint(_bytes(tensors_of(live.module)), live.uses * one.frozen_peak, kept, *peaks)


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
        for module, scale in scales:  # statistics that a VAE keeps outside of its buffers
            module.scale = [tensor.cpu() for tensor in scale]
        # Anomaly detection looks at values, and here are none.
        # A compiled function that is once called within a dispatch mode is never compiled again.
        eager = torch.compiler.set_stance("force_eager")
        with eager, FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.set_detect_anomaly(False):
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


def _of_many(measure: Callable[[int], Footprint], count: int) -> Footprint:
    """`measure(count)` of a stage that goes through so many blocks or chunks: each beyond the first few adds alike."""
    if count <= _FEW:
        return measure(count)
    fewer, few = astuple(measure(_FEW - 1)), astuple(measure(_FEW))
    return Footprint(*(last + (count - _FEW) * (last - before) for before, last in zip(fewer, few, strict=True)))


def _tail(
    denoiser: DenoiserModule, names: list[str], gradient_checkpointing: GradientCheckpointing
) -> Callable[..., Tensor]:
    """A step of it, as `Sampler` does it."""
    adapter = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    # Under "full" too, where it is backward that runs the blocks.
    denoiser.checkpoint_blocks = gradient_checkpointing != "none"

    def in_torch(**inputs: Tensor) -> dict[str, Tensor]:
        return {"velocity": denoiser(**inputs)}

    def step(*inputs: Tensor) -> Tensor:
        given = dict(zip(names, inputs, strict=True))
        whole = gradient_checkpointing == "full"
        return (recomputed(in_torch, in_torch, given, adapter) if whole else in_torch(**given))["velocity"]

    return step


def _decode(decoder: Decoder, gradient_checkpointing: GradientCheckpointing) -> Callable[[Tensor], Tensor]:
    """As a training step decodes."""
    networks, whole = decoder.networks, gradient_checkpointing == "full"

    def decode(latents: Tensor) -> Tensor:
        if gradient_checkpointing == "none" or not torch.is_grad_enabled():
            return decoder.whole(latents).float()
        return decode_recomputed(decoder.assemble, networks, networks, latents, whole).float()

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


def _frozen_bytes(module: nn.Module) -> int:
    return _bytes(p for p in module.parameters() if not p.requires_grad)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
