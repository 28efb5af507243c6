"""Gradient checkpointing whose first forward may be an engine's: a value from one place, its gradient from another.

What backward recomputes anyway runs its first forward without a graph, like any frozen use of a stage. So the fastest
backend may compute it, and PyTorch computes it once more, with a graph, where backward needs that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from frostline.models.precision import autocast_dtype

Compute = Callable[..., dict[str, Tensor]]
Networks = Mapping[str, Compute]


def recomputed(
    forward: Compute, recompute: Compute, inputs: Mapping[str, Tensor], parameters: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """The outputs of `forward`, with the gradient of `recompute` at the same inputs.

    Only the inputs are kept until backward. Autocast is as it was in forward while backward recomputes.

    Args:
        forward: `forward(**inputs)` without a graph, on any backend; returns outputs by name.
        recompute: the same in PyTorch, with a graph. Of random numbers it must not make use.
        inputs: by name; those that require a gradient get one.
        parameters: tensors that `recompute` reads and that are to get a gradient.
    Returns:
        the outputs by name, in the order of `forward`.
    """
    if not torch.is_grad_enabled():
        return forward(**inputs)
    call = _Call(forward, recompute, tuple(inputs), len(inputs))
    outputs = _Recomputed.apply(call, *inputs.values(), *parameters)
    return dict(zip(call.outputs, outputs, strict=True))


def decode_recomputed(
    assemble: Callable[[Networks, Tensor], Tensor],
    forward: Networks,
    recompute: Networks,
    latents: Tensor,
    whole: bool,
) -> Tensor:
    """Decode with a gradient, and keep for backward the inputs of every network, or the latents alone.

    Args:
        assemble: decodes with the decoder's networks.
        forward: these networks on any backend, by name.
        recompute: the same in PyTorch.
        latents: (B, C, F, h, w), normalised.
        whole: keep the latents alone; other inputs of networks, such as the caches of a causal decoder, are computed
            again in backward, by `forward`.
    Returns:
        (B, 3, T, H, W) in [-1, 1].
    """
    if whole:

        def at_once(latents: Tensor) -> dict[str, Tensor]:
            return {"video": assemble(forward, latents)}

        def by_chunk(latents: Tensor) -> dict[str, Tensor]:
            return {"video": decode_recomputed(assemble, forward, recompute, latents, whole=False)}

        return recomputed(at_once, by_chunk, {"latents": latents})["video"]

    def live(name: str) -> Compute:
        return lambda **inputs: recomputed(forward[name], recompute[name], inputs)

    return assemble({name: live(name) for name in recompute}, latents)


class _Call:
    """One use: what computes it, and under which names."""

    def __init__(self, forward: Compute, recompute: Compute, inputs: tuple[str, ...], count: int) -> None:
        self.forward, self.recompute, self.inputs, self.count = forward, recompute, inputs, count
        self.outputs: tuple[str, ...] = ()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, ctx.parameters = tensors[: call.count], tensors[call.count :]
        ctx.call = call
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        device = inputs[0].device.type
        ctx.autocast = (device, autocast_dtype(device))
        outputs = call.forward(**dict(zip(call.inputs, inputs, strict=True)))
        call.outputs = tuple(outputs)
        return tuple(outputs.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: _Call = ctx.call
        wanted = ctx.needs_input_grad[1 : call.count + 1]
        inputs = [
            tensor.detach().requires_grad_(needed) for tensor, needed in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad(), _autocast(*ctx.autocast):
            outputs = call.recompute(**dict(zip(call.inputs, inputs, strict=True)))
        given = {
            name: gradient
            for name, gradient in zip(call.outputs, gradients, strict=True)
            if gradient is not None and outputs[name].requires_grad
        }
        sources = [tensor for tensor in (*inputs, *ctx.parameters) if tensor.requires_grad]
        found = torch.autograd.grad(
            [outputs[name] for name in given],
            sources,
            [gradient.to(outputs[name].dtype) for name, gradient in given.items()],
            allow_unused=True,
        )
        by_source = dict(zip(map(id, sources), found, strict=True))
        return None, *(by_source.get(id(tensor)) for tensor in (*inputs, *ctx.parameters))


def _autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """As it was in the forward, whatever it is now."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype, enabled=dtype is not None)
