"""The spec of a Wan model: from its files or, if there are none, from the release with its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frostline.errors import ConfigError
from frostline.models.wan.model_spec import ModelSpec

from .checkpoint_files import EMBEDDED, TEXT_LENGTH, find_files, released_boundary

Arguments = Mapping[str, Any]

_TEXT_ENCODER: Arguments = {
    **{"vocab": 256384, "dim": 4096, "dim_attn": 4096, "dim_ffn": 10240, "num_heads": 64, "num_layers": 24},
    **{"num_buckets": 32, "shared_pos": False},
}
_VAE: Arguments = {"dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
_VAE_TI2V: Arguments = {**_VAE, "dim": 160, "z_dim": 48, "dec_dim": 256}
_IMAGE_ENCODER: Arguments = {"layers": 32}


def _denoiser(in_dim: int, dim: int, ffn_dim: int, num_heads: int, num_layers: int, **others: Any) -> Arguments:
    sizes = {"in_dim": in_dim, "dim": dim, "ffn_dim": ffn_dim, "num_heads": num_heads, "num_layers": num_layers}
    fixed = {"text_dim": 4096, "freq_dim": 256, "eps": 1e-6, "patch_size": (1, 2, 2), "has_image_pos_emb": False}
    flags = ("has_image_input", "require_clip_embedding", "seperated_timestep", "fuse_vae_embedding_in_latents")
    arguments = {"out_dim": 16, **dict.fromkeys(flags, False), **others}
    return {**fixed, **sizes, **arguments, "require_vae_embedding": in_dim > arguments["out_dim"]}


_T2V_14B = _denoiser(16, 5120, 13824, 40, 40)
_I2V_14B = _denoiser(36, 5120, 13824, 40, 40)
_I2V_14B_CLIP = _denoiser(36, 5120, 13824, 40, 40, has_image_input=True, require_clip_embedding=True)
_TI2V_5B = _denoiser(48, 3072, 14336, 24, 30, out_dim=48, seperated_timestep=True, fuse_vae_embedding_in_latents=True)
_BASE = {"text_encoder": _TEXT_ENCODER, "vae": _VAE}

# Released by Wan-AI; the keys are the names of the repositories.
RELEASED: Mapping[str, Mapping[str, Arguments]] = {
    "Wan2.1-T2V-1.3B": {**_BASE, "denoiser": _denoiser(16, 1536, 8960, 12, 30)},
    "Wan2.1-T2V-14B": {**_BASE, "denoiser": _T2V_14B},
    "Wan2.1-I2V-14B-480P": {**_BASE, "denoiser": _I2V_14B_CLIP, "image_encoder": _IMAGE_ENCODER},
    "Wan2.1-I2V-14B-720P": {**_BASE, "denoiser": _I2V_14B_CLIP, "image_encoder": _IMAGE_ENCODER},
    "Wan2.2-T2V-A14B": {**_BASE, "denoiser": _T2V_14B, "denoiser_high_noise": _T2V_14B},
    "Wan2.2-I2V-A14B": {**_BASE, "denoiser": _I2V_14B, "denoiser_high_noise": _I2V_14B},
    "Wan2.2-TI2V-5B": {"text_encoder": _TEXT_ENCODER, "vae": _VAE_TI2V, "denoiser": _TI2V_5B},
}


def read_spec(model: str | Path) -> ModelSpec:
    """Return the spec of `model` from the shapes in its files, without reading weights.

    If there is no such folder, the name may be that of a release, with or without `-Diffusers`.

    Raises:
        ConfigError: neither exists, or the files are not a complete model.
    """
    if str(model) in EMBEDDED or Path(model).exists():
        return find_files(model).spec
    name = Path(model).name.removesuffix("-Diffusers")
    if name not in RELEASED:
        raise ConfigError(f"{model} is neither a directory nor the name of a release ({', '.join(RELEASED)})")
    networks = RELEASED[name]
    return ModelSpec(name, networks, TEXT_LENGTH, released_boundary(networks["denoiser"]), from_files=False)
