"""Define the sizes of the tiny models, which use diffsynth's Wan classes."""

from typing import Any

VAE: dict[str, Any] = {"dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}

TEXT_ENCODER: dict[str, Any] = {
    "vocab": 64,
    "dim": 64,
    "dim_attn": 64,
    "dim_ffn": 128,
    "num_heads": 4,
    "num_layers": 2,
    "num_buckets": 8,
    "dropout": 0.0,
}
TEXT_LENGTH = 16

DENOISER: dict[str, Any] = {
    "dim": 128,
    "in_dim": 36,
    "ffn_dim": 512,
    "out_dim": 16,
    "text_dim": 64,
    "freq_dim": 64,
    "eps": 1e-6,
    "patch_size": (1, 2, 2),
    "num_heads": 4,
    "num_layers": 4,
    "has_image_input": False,
    "require_clip_embedding": False,
}

# The high-noise expert of tiny-moe.
EXPERT: dict[str, Any] = {**DENOISER, "num_layers": 2}

# tiny-ti2v: the latents of the first frame are fixed; the denoiser has no other input for it.
TI2V: dict[str, Any] = {
    **DENOISER,
    "num_layers": 2,
    "in_dim": 16,
    "require_vae_embedding": False,
    "seperated_timestep": True,
    "fuse_vae_embedding_in_latents": True,
}

# Shift of the noise schedule in training, which is the same as in sampling.
TRAIN_SHIFT = 5.0
