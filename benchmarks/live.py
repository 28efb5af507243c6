"""Time the parts of a step that need gradients, in frostline and in plain PyTorch and diffsynth.

    python benchmarks/live.py --out benchmarks/results/live.json

- decode: diffsynth's loop over latent frames, and `decode_clip`, which decodes all of them at once.
- embed: SFace in PyTorch's own operations, and in those of `frostline.models.frozen_ops`.
- tail: one denoiser step, for comparison.

Forward and backward are timed separately, first with the default allocator of the C library, then with freed memory
kept by the process (`runtime/malloc.py`). Values and gradients are compared before times are measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import RESULTS, machine, summary, time_ms, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor

from frostline.models.checkpoints.loading import load_components
from frostline.models.faces.embedders import SFaceEmbedder
from frostline.models.lora.inject import inject_lora
from frostline.models.onnx import module as onnx_module
from frostline.models.onnx import ops as onnx_ops
from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.vae import use_onednn_conv3d
from frostline.models.wan.vae_decoder_full import decode_clip
from frostline.runtime.malloc import keep_freed_memory

Piece = Callable[[Tensor], Tensor]
# Minimum cosine of the gradients; at the kinks of SFace's PReLUs, rounding of the input can change the gradient.
_LEAST_COSINE = 0.99999
CPU = torch.device("cpu")


def main() -> None:
    """Compare the results, measure the times, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="number of clips of 9 frames of 96x96 pixels")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "live.json")
    arguments = parser.parse_args()
    pieces = _pieces(arguments.batch)
    _compare(pieces)
    result: dict[str, Any] = {"machine": machine(CPU), "batch": arguments.batch, "milliseconds": {}}
    for heap in ("default allocator", "freed memory kept"):
        if heap == "freed memory kept" and not keep_freed_memory():
            break
        result["milliseconds"][heap] = summary(_measure(pieces, arguments.rounds))
        write_result(arguments.out, result)
    _print(result["milliseconds"])


def _pieces(batch: int) -> dict[str, tuple[Piece, Tensor]]:
    """Return the function and the input of each piece, by name."""
    torch.manual_seed(0)
    components = load_components("tiny")
    vae: Any = components.vae
    use_onednn_conv3d(vae)
    inject_lora(components.denoiser, 8)
    denoiser = Denoiser(components.denoiser)
    others = (torch.full((batch,), 500.0), torch.randn(batch, 16, 64), torch.randn(batch, 20, 3, 12, 12))
    latents, faces = torch.randn(batch, 16, 3, 12, 12), 2 * torch.rand(9 * batch, 3, 112, 112) - 1
    embedder = SFaceEmbedder()
    return {
        "decode, diffsynth": (lambda z: vae.model.decode(z, vae.scale), latents),
        "decode": (lambda z: decode_clip(vae, z), latents),
        "embed, PyTorch": (_in_plain_operations(embedder), faces),
        "embed": (embedder, faces),
        "tail, a step": (lambda z: denoiser(z, *others), latents),
    }


def _in_plain_operations(embedder: SFaceEmbedder) -> Piece:
    """Return the embedder with PyTorch's own operations and the activations that autograd saves for them."""

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, **attributes: Any) -> Tensor:
        x, padding = onnx_ops._split_padding(x, attributes.get("pads"), 0.0)
        strides = tuple(attributes.get("strides", (1, 1)))
        return F.conv2d(x, weight, bias, strides, padding, 1, attributes.get("group", 1))

    def prelu(x: Tensor, slope: Tensor) -> Tensor:
        return F.prelu(x, slope.flatten())

    plain = {**onnx_ops.OPERATIONS, "Conv": convolution, "PRelu": prelu}

    def embed(faces: Tensor) -> Tensor:
        own, onnx_module.OPERATIONS = onnx_module.OPERATIONS, plain
        try:
            return embedder(faces)
        finally:
            onnx_module.OPERATIONS = own

    return embed


def _compare(pieces: dict[str, tuple[Piece, Tensor]]) -> None:
    for fast, plain in (("decode", "decode, diffsynth"), ("embed", "embed, PyTorch")):
        values, gradients = [], []
        for name in (fast, plain):
            piece, given = pieces[name]
            leaf = given.clone().requires_grad_()
            value = piece(leaf)
            value.backward(_gradient(value))
            assert leaf.grad is not None
            values.append(value.detach())
            gradients.append(leaf.grad.double().flatten())
        error = ((values[0] - values[1]).norm() / values[1].norm()).item()
        cosine = F.cosine_similarity(*gradients, dim=0).item()
        Console().print(f"{fast}: relative error {error:.1e}, cosine of gradients 1 - {1 - cosine:.1e}")
        if error > 1e-5 or cosine < _LEAST_COSINE:
            raise SystemExit(f"{fast} and {plain} give different results: their times are not comparable")


def _measure(pieces: dict[str, tuple[Piece, Tensor]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Return the milliseconds of forward and backward of each piece, measured alternately."""
    samples: dict[str, list[float]] = {f"{name}: {way}": [] for name in pieces for way in ("forward", "backward")}
    for index in range(warm_up + rounds):
        for name, (piece, given) in pieces.items():
            leaf, results = given.clone().requires_grad_(), []
            forward = time_ms(partial(_append, results, piece, leaf), CPU)
            backward = time_ms(partial(results[0].backward, _gradient(results[0])), CPU)
            if index >= warm_up:
                samples[f"{name}: forward"].append(forward)
                samples[f"{name}: backward"].append(backward)
    return samples


def _append(results: list[Tensor], piece: Piece, leaf: Tensor) -> None:
    results.append(piece(leaf))


def _gradient(result: Tensor) -> Tensor:
    return torch.linspace(-1, 1, result.shape[-1]).expand_as(result)


def _print(milliseconds: dict[str, dict[str, dict[str, float]]]) -> None:
    table = Table("piece", *(f"{heap}, ms" for heap in milliseconds), title="the live part of a step")
    for name in next(iter(milliseconds.values())):
        table.add_row(name, *(f"{rows[name]['median_ms']:.0f}" for rows in milliseconds.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
