"""The description of a Wan model, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from frostline.models.video_shape import Geometry

from .networks import build_network
from .video_shape import SPATIAL_STRIDE, TEMPORAL_STRIDE

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelSpec:
    """The description of a Wan model, without its weights.

    Attributes:
        name: name of the model in the engine store.
        networks: the constructor arguments of each network, by its field in `WanComponents`; includes all arguments
            that the properties below read, also defaults.
        text_length: number of tokens in a text context; prompts are padded or truncated to it.
        boundary: the high-noise expert handles timesteps from `boundary * 1000`; unused for models with one expert.
        license: SPDX identifier of the weights' licence in the model card; None if it states none.
        from_files: whether the description was read from files, or is that of the release with this name. Ignored when
            specs are compared.
    """

    name: str
    networks: Mapping[str, Mapping[str, Any]]
    text_length: int
    boundary: float = 0.9
    license: str | None = None
    from_files: bool = field(default=True, compare=False)

    def build(self, field: str) -> nn.Module:
        """Return one of the networks with its parameters on the meta device."""
        from frostline.models.meta_tensors import meta_parameters

        with meta_parameters():
            return build_network(field, self.networks[field])

    @property
    def two_experts(self) -> bool:
        """Return whether a second denoiser handles the high noise levels."""
        return "denoiser_high_noise" in self.networks

    @property
    def takes_image_latents(self) -> bool:
        """Return whether the denoiser takes `y`: the mask and latents of the first frame."""
        denoiser = self.networks["denoiser"]
        return denoiser["require_vae_embedding"] and denoiser["in_dim"] > self.latent_channels

    @property
    def takes_clip_feature(self) -> bool:
        """Return whether the denoiser takes the CLIP feature of the first frame."""
        denoiser = self.networks["denoiser"]
        return denoiser["has_image_input"] and denoiser["require_clip_embedding"]

    @property
    def pins_first_frame(self) -> bool:
        """Return whether the first frame's latents are given and fixed during sampling (Wan2.2 TI2V)."""
        denoiser = self.networks["denoiser"]
        return denoiser["seperated_timestep"] and denoiser["fuse_vae_embedding_in_latents"]

    @property
    def needs_image(self) -> bool:
        """Return whether the model generates from a first frame."""
        return self.takes_image_latents or self.pins_first_frame

    @property
    def latent_channels(self) -> int:
        """Return the number of channels of a video's latents."""
        return self.networks["vae"]["z_dim"]

    @property
    def geometry(self) -> Geometry:
        """Return the video sizes that the model supports."""
        # The VAE of Wan2.2 TI2V, the only one whose decoder has another width, downsamples by a further factor of 2.
        stride = 2 * SPATIAL_STRIDE if "dec_dim" in self.networks["vae"] else SPATIAL_STRIDE
        # The denoiser uses patches of the latents.
        return Geometry(TEMPORAL_STRIDE, stride, stride * self.networks["denoiser"]["patch_size"][1])
