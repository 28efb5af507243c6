"""Tensor names in Wan's releases and in diffusers: one table for each network, usable in both directions.

A row pairs two module paths (or bare parameters); `{}` is the number of a block. The rest of a name (`.weight`,
`.lora_A.weight`, …) is the same in both formats. Source: `scripts/convert_wan_to_diffusers.py` of diffusers for
denoiser and VAE; the text and image encoders are `UMT5EncoderModel` and `CLIPVisionModel` of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Literal

Part = Literal["denoiser", "vae", "text_encoder", "image_encoder"]
Pairs = tuple[tuple[str, str], ...]

_ATTENTION = (
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("o", "to_out.0"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
)

DENOISER: Pairs = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    *((f"blocks.{{}}.self_attn.{ours}", f"blocks.{{}}.attn1.{theirs}") for ours, theirs in _ATTENTION),
    *((f"blocks.{{}}.cross_attn.{ours}", f"blocks.{{}}.attn2.{theirs}") for ours, theirs in _ATTENTION),
    ("blocks.{}.cross_attn.k_img", "blocks.{}.attn2.add_k_proj"),
    ("blocks.{}.cross_attn.v_img", "blocks.{}.attn2.add_v_proj"),
    ("blocks.{}.cross_attn.norm_k_img", "blocks.{}.attn2.norm_added_k"),
    # Wan applies the norms in the order 1, 3, 2; diffusers numbers them in the order of application.
    ("blocks.{}.norm3", "blocks.{}.norm2"),
    ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
    ("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
)

TEXT_ENCODER: Pairs = (
    ("token_embedding", "shared"),
    *((f"blocks.{{}}.attn.{name}", f"encoder.block.{{}}.layer.0.SelfAttention.{name}") for name in "qkvo"),
    (
        "blocks.{}.pos_embedding.embedding",
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
    ),
    ("blocks.{}.norm1", "encoder.block.{}.layer.0.layer_norm"),
    ("blocks.{}.ffn.gate.0", "encoder.block.{}.layer.1.DenseReluDense.wi_0"),
    ("blocks.{}.ffn.fc1", "encoder.block.{}.layer.1.DenseReluDense.wi_1"),
    ("blocks.{}.ffn.fc2", "encoder.block.{}.layer.1.DenseReluDense.wo"),
    ("blocks.{}.norm2", "encoder.block.{}.layer.1.layer_norm"),
    ("norm", "encoder.final_layer_norm"),
)

# `to_qkv`, the class and position embeddings and the head also differ in shape: see `convert`.
IMAGE_ENCODER: Pairs = (
    ("visual.patch_embedding", "vision_model.embeddings.patch_embedding"),
    ("visual.pre_norm", "vision_model.pre_layrnorm"),
    ("visual.transformer.{}.norm1", "vision_model.encoder.layers.{}.layer_norm1"),
    ("visual.transformer.{}.attn.proj", "vision_model.encoder.layers.{}.self_attn.out_proj"),
    ("visual.transformer.{}.norm2", "vision_model.encoder.layers.{}.layer_norm2"),
    ("visual.transformer.{}.mlp.0", "vision_model.encoder.layers.{}.mlp.fc1"),
    ("visual.transformer.{}.mlp.2", "vision_model.encoder.layers.{}.mlp.fc2"),
    ("visual.post_norm", "vision_model.post_layernorm"),
)

_RESIDUAL = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)
_RESAMPLE = ("resample.1", "time_conv")
_SIDES = (("encoder", "down"), ("decoder", "up"))


def vae_pairs(levels: int, res_blocks: int, nested: bool) -> Pairs:
    """Return the table of a VAE.

    Args:
        levels: number of resolutions of encoder and decoder, 4 in all releases.
        res_blocks: number of residual blocks at each resolution of the encoder; the decoder has one more.
        nested: whether the blocks of a resolution are one module (Wan2.2 TI2V), or all blocks are in one list (Wan2.1).
    """
    pairs = [("conv1", "quant_conv"), ("conv2", "post_quant_conv")]
    for side, direction in _SIDES:
        pairs += [
            (f"{side}.conv1", f"{side}.conv_in"),
            (f"{side}.middle.1.norm", f"{side}.mid_block.attentions.0.norm"),
            (f"{side}.middle.1.to_qkv", f"{side}.mid_block.attentions.0.to_qkv"),
            (f"{side}.middle.1.proj", f"{side}.mid_block.attentions.0.proj"),
            (f"{side}.head.0", f"{side}.norm_out"),
            (f"{side}.head.2", f"{side}.conv_out"),
        ]
        for index, block in enumerate((0, 2)):
            pairs += _residual(f"{side}.middle.{block}", f"{side}.mid_block.resnets.{index}")
        per_level = res_blocks + (side == "decoder")
        for level in range(levels):
            pairs += (_nested if nested else _flat)(side, direction, level, per_level)
    return tuple(pairs)


def _nested(side: str, direction: str, level: int, res_blocks: int) -> Iterator[tuple[str, str]]:
    ours, theirs = f"{side}.{direction}samples.{level}", f"{side}.{direction}_blocks.{level}"
    for index in range(res_blocks):
        yield from _residual(f"{ours}.{direction}samples.{index}", f"{theirs}.resnets.{index}")
    for name in _RESAMPLE:
        yield f"{ours}.{direction}samples.{res_blocks}.{name}", f"{theirs}.{direction}sampler.{name}"


def _flat(side: str, direction: str, level: int, res_blocks: int) -> Iterator[tuple[str, str]]:
    # diffusers also has one list for the encoder, but groups the blocks of the decoder by resolution.
    first = level * (res_blocks + 1)
    in_list = [f"{side}.{direction}_blocks.{first + index}" for index in range(res_blocks + 1)]
    block = f"{side}.{direction}_blocks.{level}"
    sorted_ = [*(f"{block}.resnets.{index}" for index in range(res_blocks)), f"{block}.upsamplers.0"]
    theirs = in_list if side == "encoder" else sorted_
    for index in range(res_blocks):
        yield from _residual(f"{side}.{direction}samples.{first + index}", theirs[index])
    for name in _RESAMPLE:
        yield f"{side}.{direction}samples.{first + res_blocks}.{name}", f"{theirs[-1]}.{name}"


def _residual(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [(f"{ours}.{official}", f"{theirs}.{diffusers}") for official, diffusers in _RESIDUAL]


def rename(names: Iterable[str], pairs: Pairs, *, to_diffusers: bool) -> dict[str, str]:
    """Return the new name of each of `names` that is in the table `pairs`.

    Args:
        to_diffusers: rename from Wan's format to diffusers'; otherwise in the other direction.
    """
    rules = _rules(pairs, to_diffusers)
    renamed = {}
    for name in names:
        for pattern, replacement in rules:
            match = pattern.fullmatch(name)
            if match:
                renamed[name] = replacement.format(*match.groups()[:-1]) + match.groups()[-1]
                break
    return renamed


@cache
def _rules(pairs: Pairs, to_diffusers: bool) -> tuple[tuple[re.Pattern[str], str], ...]:
    rows = pairs if to_diffusers else tuple((theirs, ours) for ours, theirs in pairs)
    return tuple((re.compile(re.escape(old).replace(r"\{\}", r"(\d+)") + r"((?:\..+)?)"), new) for old, new in rows)
