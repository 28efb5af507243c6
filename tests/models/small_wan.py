"""Arguments of small Wan models with random weights; only their sizes differ from the official ones."""

from pathlib import Path
from typing import Any

from frostline.models.checkpoints import loading

TOKENIZER = Path(loading.__file__).parents[1] / "tiny" / "weights" / "tiny" / "google" / "umt5-xxl"

VAE = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
TEXT = {"vocab": 64, "dim": 32, "dim_attn": 32, "dim_ffn": 64, "num_heads": 2, "num_layers": 2, "num_buckets": 8}
# As in releases: 128 dimensions per head, and 256 dimensions of the timestep sinusoid.
DENOISER: dict[str, Any] = {
    "dim": 256,
    "in_dim": 36,
    "ffn_dim": 320,
    "out_dim": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "eps": 1e-6,
    "patch_size": (1, 2, 2),
    "num_heads": 2,
    "num_layers": 2,
    "has_image_input": False,
    "require_clip_embedding": False,
}
