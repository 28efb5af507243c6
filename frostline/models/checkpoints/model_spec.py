"""What a Wan model consists of and how large it is, without its weights: from its files, or as it was released."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.deferred_init import deferred_init
from frostline.errors import ConfigError
from frostline.models.checkpoints.networks import build_network
from frostline.models.wan.video_shape import SPATIAL_MULTIPLE

from .checkpoint_files import BOUNDARY_IMAGE, BOUNDARY_TEXT, EMBEDDED, TEXT_LENGTH, find_files
from .formats.architecture import network_arguments
from .formats.names import Part

if TYPE_CHECKING:
    from torch import nn

Network = tuple[Part, Mapping[str, Any]]

_TEXT_ENCODER: Network = (
    "text_encoder",
    {"vocab": 256384, "dim": 4096, "dim_attn": 4096, "dim_ffn": 10240, "num_heads": 64, "num_layers": 24},
)
_VAE: Network = ("vae", {"dim": 96, "z_dim": 16})
_VAE_TI2V: Network = ("vae", {"dim": 160, "z_dim": 48, "dec_dim": 256})
_IMAGE_ENCODER: Network = ("image_encoder", {"layers": 32})


def _denoiser(in_dim: int, dim: int, ffn_dim: int, num_heads: int, num_layers: int, **others: Any) -> Network:
    arguments = {"out_dim": 16, "has_image_input": False, "require_clip_embedding": False, **others}
    sizes = {"in_dim": in_dim, "dim": dim, "ffn_dim": ffn_dim, "num_heads": num_heads, "num_layers": num_layers}
    fixed = {"text_dim": 4096, "freq_dim": 256, "eps": 1e-6, "patch_size": (1, 2, 2)}
    arguments.setdefault("require_vae_embedding", in_dim > arguments["out_dim"])
    return "denoiser", {**fixed, **sizes, **arguments}


_T2V_14B = _denoiser(16, 5120, 13824, 40, 40)
_I2V_14B = _denoiser(36, 5120, 13824, 40, 40)
_I2V_14B_CLIP = _denoiser(36, 5120, 13824, 40, 40, has_image_input=True, require_clip_embedding=True)
_TI2V_5B = _denoiser(48, 3072, 14336, 24, 30, out_dim=48, seperated_timestep=True, fuse_vae_embedding_in_latents=True)
_BASE = {"text_encoder": _TEXT_ENCODER, "vae": _VAE}

# As released by Wan-AI, by the names of the repositories.
RELEASED: Mapping[str, Mapping[str, Network]] = {
    "Wan2.1-T2V-1.3B": {**_BASE, "denoiser": _denoiser(16, 1536, 8960, 12, 30)},
    "Wan2.1-T2V-14B": {**_BASE, "denoiser": _T2V_14B},
    "Wan2.1-I2V-14B-480P": {**_BASE, "denoiser": _I2V_14B_CLIP, "image_encoder": _IMAGE_ENCODER},
    "Wan2.1-I2V-14B-720P": {**_BASE, "denoiser": _I2V_14B_CLIP, "image_encoder": _IMAGE_ENCODER},
    "Wan2.2-T2V-A14B": {**_BASE, "denoiser": _T2V_14B, "denoiser_high_noise": _T2V_14B},
    "Wan2.2-I2V-A14B": {**_BASE, "denoiser": _I2V_14B, "denoiser_high_noise": _I2V_14B},
    "Wan2.2-TI2V-5B": {"text_encoder": _TEXT_ENCODER, "vae": _VAE_TI2V, "denoiser": _TI2V_5B},
}


@dataclass(frozen=True)
class Skeleton:
    """The networks of a model by field name of `WanComponents`, each with the arguments that build it.

    boundary: see `WanComponents`. from_files: whether they are of files, or of the release that the model is named
    after.
    """

    name: str
    networks: Mapping[str, Network]
    text_length: int
    boundary: float
    from_files: bool

    def build(self, field: str) -> nn.Module:
        """One of the networks, its parameters on the meta device."""
        with deferred_init("diffsynth"):
            from diffsynth.core.vram.initialization import skip_model_initialization

        part, arguments = self.networks[field]
        with skip_model_initialization():
            return build_network(part, arguments)

    @property
    def spatial_multiple(self) -> int:
        """See `WanComponents`."""
        # Only the VAE of Wan2.2 TI2V has a decoder of other sizes than its encoder; it halves once more.
        return SPATIAL_MULTIPLE * (2 if "dec_dim" in self.networks["vae"][1] else 1)


def read_skeleton(model: str | Path) -> Skeleton:
    """How large `model` is, by the shapes in its files; no weights are read.

    Where there is no such folder, its name may be that of a release, with or without `-Diffusers`.

    Raises:
        ConfigError: it is neither, or its files do not make a model.
    """
    name = Path(model).name.removesuffix("-Diffusers")
    if str(model) not in EMBEDDED and not Path(model).exists():
        if name not in RELEASED:
            raise ConfigError(f"{model} is no folder and named after none of the releases {', '.join(RELEASED)}")
        boundary = BOUNDARY_TEXT if "T2V" in name else BOUNDARY_IMAGE
        return Skeleton(name, RELEASED[name], TEXT_LENGTH, boundary, from_files=False)
    files = find_files(model)
    networks: dict[str, Network] = {}
    for field, network in files.networks():
        try:
            networks[field] = network.part, network_arguments(network.part, network.shapes, network.config)
        except (LookupError, ValueError, TypeError, ArithmeticError) as error:
            raise ConfigError(f"{network} cannot be loaded: {error}") from error
    return Skeleton(files.name, networks, files.text_length, files.boundary, from_files=True)
