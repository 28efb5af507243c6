"""Infer the constructor arguments of each network from tensor names and shapes in Wan's format."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .names import Part

Shapes = Mapping[str, tuple[int, ...]]

# Number of latent channels of the Wan2.2 TI2V VAE; no other model has as many.
_TI2V_CHANNELS = 48
# Prefixes of the tensor names of blocks. In the VAE, a missing block is detected from the sizes of its neighbours.
_BLOCKS: Mapping[Part, str] = {
    "denoiser": r"blocks\.(\d+)\.",
    "text_encoder": r"blocks\.(\d+)\.",
    "image_encoder": r"visual\.transformer\.(\d+)\.",
}


def network_arguments(part: Part, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments of a network; see the functions below for the exceptions.

    Args:
        shapes: the shapes of its weights, by name in Wan's format.
        config: see `denoiser_arguments`; only used for the denoiser.
    """
    if part == "denoiser":
        return denoiser_arguments(shapes, config)
    if part == "image_encoder":
        return {"layers": image_encoder_layers(shapes)}
    return vae_arguments(shapes) if part == "vae" else text_encoder_arguments(shapes)


def denoiser_arguments(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `WanModel`.

    Args:
        config: content of `config.json` in the folder, in Wan's or diffusers' format, for values that shapes do not
            determine; may be empty.
    Raises:
        KeyError, ValueError, IndexError: the tensors are not those of a denoiser.
    """
    dim, in_dim, *patch_size = shapes["patch_embedding.weight"]
    has_image_input = "img_emb.proj.0.weight" in shapes
    out_dim = shapes["head.head.weight"][0] // math.prod(patch_size)
    pins_first_frame = config.get("model_type") == "ti2v" or in_dim == out_dim == _TI2V_CHANNELS
    heads = config.get("num_heads") or config.get("num_attention_heads") or dim // 128
    return {
        "dim": dim,
        "in_dim": in_dim,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "out_dim": out_dim,
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "eps": config.get("eps", 1e-6),
        "patch_size": tuple(patch_size),
        "num_heads": heads,
        "num_layers": len(_block_numbers("denoiser", shapes)),
        "has_image_input": has_image_input,
        "has_image_pos_emb": "img_emb.emb_pos" in shapes,
        "require_clip_embedding": has_image_input,
        "require_vae_embedding": in_dim > out_dim,
        "seperated_timestep": pins_first_frame,
        "fuse_vae_embedding_in_latents": pins_first_frame,
    }


def text_encoder_arguments(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of `WanTextEncoder`.

    Raises:
        KeyError, ValueError: the tensors are not those of a text encoder.
    """
    vocabulary, dim = shapes["token_embedding.weight"]
    shared_pos = "pos_embedding.embedding.weight" in shapes
    position = "pos_embedding.embedding.weight" if shared_pos else "blocks.0.pos_embedding.embedding.weight"
    buckets, heads = shapes[position]
    return {
        "vocab": vocabulary,
        "dim": dim,
        "dim_attn": shapes["blocks.0.attn.q.weight"][0],
        "dim_ffn": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_heads": heads,
        "num_layers": len(_block_numbers("text_encoder", shapes)),
        "num_buckets": buckets,
        "shared_pos": shared_pos,
    }


def vae_arguments(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of `VideoVAE_`, or, with `dec_dim`, of Wan2.2 TI2V's `VideoVAE38_`.

    Raises:
        KeyError, ValueError, IndexError, ZeroDivisionError: the tensors are not those of a VAE.
    """
    dim = shapes["encoder.conv1.weight"][0]
    # `VideoVAE38_` folds 2×2 pixels into the channels of its first convolution.
    folds_pixels = shapes["encoder.conv1.weight"][1] == 12
    widths: list[list[int]] = [[]]
    blocks = re.compile(r"encoder\.downsamples\.((?:\d+\.downsamples\.)?\d+)\.(residual\.2|resample\.1)\.weight")
    found = {tuple(map(int, m[1].split(".downsamples."))): (m[2], n) for n in shapes if (m := blocks.fullmatch(n))}
    for kind, name in (found[key] for key in sorted(found)):
        if kind == "residual.2":
            widths[-1].append(shapes[name][0])
        else:
            widths.append([])
    arguments: dict[str, Any] = {
        "dim": dim,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": [level[0] // dim for level in widths],
        "num_res_blocks": len(widths[0]),
    }
    if folds_pixels:
        arguments["dec_dim"] = shapes["decoder.conv1.weight"][0] // arguments["dim_mult"][-1]
    return arguments


def image_encoder_layers(shapes: Shapes) -> int:
    """Return the number of blocks of the image encoder, 32 in the release; all other sizes are fixed.

    Raises:
        KeyError: the tensors are not those of an image encoder.
    """
    if "visual.patch_embedding.weight" not in shapes:
        raise KeyError("visual.patch_embedding.weight")
    return len(_block_numbers("image_encoder", shapes))


def missing_blocks(part: Part, shapes: Shapes, config: Mapping[str, Any]) -> str | None:
    """Return a message if blocks are missing; otherwise None.

    Args:
        shapes: by name in Wan's format.
        config: content of `config.json` in the folder, which may belong to another part.
    """
    if part not in _BLOCKS:
        return None
    numbers = _block_numbers(part, shapes)
    gap = next((number for number in range(max(numbers, default=-1)) if number not in numbers), None)
    if gap is not None:
        return f"block {gap} is missing, but there is a block {max(numbers)}"
    said = _said_blocks(part, config)
    if said is not None and said != len(numbers):
        return f"there are {len(numbers)} blocks, but config.json states {said}"
    return None


def _said_blocks(part: Part, config: Mapping[str, Any]) -> int | None:
    """Return the number of blocks that `config` states; None if it is the config of another part.

    Wan stores all parts in one folder, with the config of the denoiser; a config of transformers names its part.
    """
    kind = str(config.get("model_type"))
    if part == "image_encoder":
        own, key = kind.startswith("clip"), "num_hidden_layers"
        config = config.get("vision_config", config)
    else:
        of_text = kind in ("t5", "umt5")
        own, key = of_text == (part == "text_encoder") and not kind.startswith("clip"), "num_layers"
    said = config.get(key) if own and isinstance(config, Mapping) else None
    return said if isinstance(said, int) else None


def _block_numbers(part: Part, shapes: Shapes) -> set[int]:
    return {int(match[1]) for name in shapes if (match := re.match(_BLOCKS[part], name))}
