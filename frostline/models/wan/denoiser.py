"""A forward pass for diffsynth's `WanModel` with the same weights: real-valued, batched and exportable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, noop_context_fn

from frostline.models.block_offload import BlockForward, BlockOffload
from frostline.models.precision import autocast_dtype

from .rope import apply_rope, grid_table, rope_table, sinusoid_frequencies, timestep_sinusoid

if TYPE_CHECKING:
    from diffsynth.models.wan_video_dit import DiTBlock, SelfAttention, WanModel


class Denoiser(nn.Module):
    """`v(x_i, t_i)`: equal to `diffsynth.pipelines.wan_video.model_fn_wan_video`, for any batch.

    diffsynth's function computes RoPE in complex128 and uses one timestep for all samples if the first frame is fixed,
    and diffsynth's `WanModel.forward` is out of date; this class has none of these limits.

    Args:
        model: the weights; LoRA layers may have been injected.

    Attributes:
        checkpoint_blocks: keep only the input of each block for backward, and recompute the rest.
        offload: runs the blocks if some are offloaded to main memory; moving the module does not move their weights.
    """

    cos_f: Tensor
    cos_h: Tensor
    cos_w: Tensor
    sin_f: Tensor
    sin_h: Tensor
    sin_w: Tensor
    frequency_coarse: Tensor
    frequency_fine: Tensor
    # Attributes that affect how blocks are run, not their results; see `frostline.runtime.identity.architecture`.
    RUN_SETTINGS = frozenset({"checkpoint_blocks", "run_block", "offload"})
    _TABLES = ("cos_f", "cos_h", "cos_w", "sin_f", "sin_h", "sin_w", "frequency_coarse", "frequency_fine")

    def __init__(self, model: WanModel) -> None:
        super().__init__()
        self.model = model
        self.checkpoint_blocks = False
        self.offload: BlockOffload | None = None
        self.run_block: BlockForward = _block
        axes = [rope_table(frequencies) for frequencies in model.freqs]
        tables = [cos for cos, _ in axes] + [sin for _, sin in axes] + [*sinusoid_frequencies(model.freq_dim)]
        for name, table in zip(self._TABLES, tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Denoiser:
        # `.to(torch.bfloat16)` must move the tables but not round them.
        exact = {name: getattr(self, name) for name in self._TABLES}
        waiting = set() if self.offload is None else {id(parameter) for parameter in self.offload.weights()}
        super()._apply(lambda tensor: tensor if id(tensor) in waiting else fn(tensor), recurse)
        device = self.model.patch_embedding.weight.device
        for name, table in exact.items():
            setattr(self, name, table.to(device))
        return self

    def compile_blocks(self) -> None:
        """Compile every block with `torch.compile`, for live and frozen uses; all blocks share the compiled code."""
        self.run_block = torch.compile(_block)

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the transformer blocks."""
        return cast(nn.ModuleList, self.model.blocks)

    @contextmanager
    def first_blocks(self, count: int) -> Iterator[None]:
        """Run only the first `count` blocks within the context."""
        blocks = self.blocks
        self.model.blocks = blocks[:count]
        try:
            yield
        finally:
            self.model.blocks = blocks

    @property
    def pins_first_frame(self) -> bool:
        """Return whether the first frame's latents are given and have timestep 0 (Wan2.2 TI2V)."""
        return self.model.seperated_timestep and self.model.fuse_vae_embedding_in_latents

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        clip_feature: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity.

        Args:
            latents: (B, C, F, H, W) noisy latents, H and W even.
            timestep: (B,) float in [0, 1000].
            context: (B, L, text_dim) text embeddings, zero after the prompt's end.
            y: (B, 4 + C, F, H, W) mask and image latents, for models that take them.
            clip_feature: (B, 257, 1280) image embedding, for models that take it.
        Returns:
            (B, C, F, H, W) in the latents' dtype.
        """
        model = self.model
        x = latents if y is None else torch.cat([latents, y], dim=1)
        x = model.patch_embedding(x)
        grid = (x.shape[2], x.shape[3], x.shape[4])
        # Dense, because Inductor computes a wrong gradient for transposed tokens if their number is not a multiple of
        # the vector size.
        x = x.flatten(2).transpose(1, 2).contiguous()
        time, modulation = self._time_embedding(timestep, grid, x.dtype)
        context = model.text_embedding(context)
        if clip_feature is not None:
            context = torch.cat([model.img_emb(clip_feature), context], dim=1)
        cos = grid_table((self.cos_f, self.cos_h, self.cos_w), grid)
        sin = grid_table((self.sin_f, self.sin_h, self.sin_w), grid)
        # Tracing must see the operations themselves, not compiled code.
        exporting, contexts = torch.compiler.is_exporting(), noop_context_fn
        run_block = _block if exporting else self.run_block
        if self.offload is not None and not exporting:
            run_block, contexts = partial(self.offload.run, run_block), self.offload.contexts
        per_block = self.checkpoint_blocks and torch.is_grad_enabled()
        for block in cast("list[DiTBlock]", model.blocks):
            if per_block:
                inputs = (block, x, context, modulation, cos, sin)
                x = checkpoint(run_block, *inputs, use_reentrant=False, context_fn=contexts)
            else:
                x = run_block(block, x, context, modulation, cos, sin)
        return model.unpatchify(model.head(x, time), grid)  # type: ignore[arg-type]

    def _time_embedding(
        self, timestep: Tensor, grid: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the embedding of the timestep and the modulation of the blocks, computed in fp32 and rounded once.

        As in Wan: in bf16, the sinusoid alone would have errors of up to 4e-3.

        Returns:
            (B, dim) and (B, 6, dim), both of `dtype`; (B, tokens, dim) and (B, tokens, 6, dim) if the first frame is
            fixed at timestep 0.
        """
        if self.pins_first_frame:
            frames, tokens = grid[0], grid[1] * grid[2]
            later = torch.arange(frames, device=timestep.device) > 0
            timestep = (timestep[:, None] * later)[:, :, None].expand(-1, -1, tokens).flatten(1)
        sinusoid = timestep_sinusoid(timestep, self.frequency_coarse, self.frequency_fine)
        device = sinusoid.device.type
        # Autocast would round the layers' inputs. If autocast is off, a trace must not contain it.
        with torch.autocast(device, enabled=False) if autocast_dtype(device) else nullcontext():
            time = _in_fp32(self.model.time_embedding, sinusoid)
            modulation = _in_fp32(self.model.time_projection, time)
        return time.to(dtype), modulation.to(dtype).unflatten(-1, (6, self.model.dim))


def _in_fp32(network: nn.Module, x: Tensor) -> Tensor:
    """Return the result of `network` for fp32 `x`, with fp32 copies of its weights of any type."""
    parameters = dict(network.named_parameters())
    if all(parameter.dtype == torch.float32 for parameter in parameters.values()):
        return network(x)
    return functional_call(network, {name: parameter.float() for name, parameter in parameters.items()}, (x,))


def _block(block: DiTBlock, x: Tensor, context: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `DiTBlock.forward`; `modulation` is (B, 6, dim) or (B, tokens, 6, dim)."""
    parts = (block.modulation.to(modulation.dtype) + modulation).unbind(-2)
    if modulation.ndim == 3:
        parts = tuple(part[:, None] for part in parts)
    shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = parts
    normed = block.norm1(x) * (1 + scale_attn) + shift_attn
    x = x + gate_attn * _self_attention(block.self_attn, normed, cos, sin)
    x = x + block.cross_attn(block.norm3(x), context)
    normed = block.norm2(x) * (1 + scale_ffn) + shift_ffn
    return x + gate_ffn * block.ffn(normed)


def _self_attention(attention: SelfAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q = apply_rope(attention.norm_q(attention.q(x)), cos, sin, attention.num_heads)
    k = apply_rope(attention.norm_k(attention.k(x)), cos, sin, attention.num_heads)
    return attention.o(attention.attn(q, k, attention.v(x)))
