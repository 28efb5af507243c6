"""Gradient checkpointing in which an engine can run the first forward pass.

With gradient checkpointing, the first forward pass has no graph, like a frozen use of a stage, so the fastest backend
can run it. Backward runs the forward pass again in PyTorch, with a graph.
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
    """Return the outputs of `forward`, with the gradient of `recompute` at the same inputs.

    Only the inputs are kept until backward, which recomputes with the autocast state of the forward pass.

    Args:
        forward: maps the inputs to outputs by name without a graph, on any backend.
        recompute: the same function in PyTorch, with a graph; must not use random numbers.
        inputs: inputs by name; the gradient of those that require one is computed.
        parameters: tensors that `recompute` uses and whose gradient is computed, too.
    Returns:
        The outputs by name, in the order of `forward`.
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
    """Decode with a gradient; keep only the inputs of every network, or only the latents, until backward.

    Args:
        assemble: decodes latents with the given networks of the decoder.
        forward: the networks on any backend, by name.
        recompute: the same networks in PyTorch.
        latents: (B, C, F, h, w), normalised.
        whole: keep only the latents; backward computes the other inputs of the networks, such as the caches of a causal
            decoder, again with `forward`.
    Returns:
        Video (B, 3, T, H, W) in [-1, 1].
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
    """The functions of one call, and the names of its inputs and outputs."""

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
    """Return an autocast context with this dtype; autocast is disabled if it is None."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype, enabled=dtype is not None)
