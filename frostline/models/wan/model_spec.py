"""What a Wan model is, without its weights."""

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
    """What a Wan model is, without its weights.

    name: names the model in the engine store.
    networks: the constructor arguments of each network, by its field in `WanComponents`; all those that the properties
        below read are stated, defaults too.
    text_length: tokens in a text context; prompts are padded or cut to it.
    boundary: the high-noise expert serves timesteps from `boundary * 1000` up; of no effect without one.
    license: of the weights, as the model card states it: an SPDX identifier; None where it states none.
    from_files: whether it is that of files, or of the release that the model is named after. No part of what the model
        is, so specs that differ in it alone are equal.
    """

    name: str
    networks: Mapping[str, Mapping[str, Any]]
    text_length: int
    boundary: float = 0.9
    license: str | None = None
    from_files: bool = field(default=True, compare=False)

    def build(self, field: str) -> nn.Module:
        """Return one of the networks, its parameters on the meta device."""
        from frostline.models.meta_tensors import meta_parameters

        with meta_parameters():
            return build_network(field, self.networks[field])

    @property
    def two_experts(self) -> bool:
        """Whether a second denoiser serves the high noise levels."""
        return "denoiser_high_noise" in self.networks

    @property
    def takes_image_latents(self) -> bool:
        """Whether the denoiser is conditioned on `y`: the mask and latents of the first frame."""
        denoiser = self.networks["denoiser"]
        return denoiser["require_vae_embedding"] and denoiser["in_dim"] > self.latent_channels

    @property
    def takes_clip_feature(self) -> bool:
        """Whether the denoiser is conditioned on the CLIP feature of the first frame."""
        denoiser = self.networks["denoiser"]
        return denoiser["has_image_input"] and denoiser["require_clip_embedding"]

    @property
    def pins_first_frame(self) -> bool:
        """Whether the first frame's latents are given and kept through sampling (Wan2.2 TI2V)."""
        denoiser = self.networks["denoiser"]
        return denoiser["seperated_timestep"] and denoiser["fuse_vae_embedding_in_latents"]

    @property
    def needs_image(self) -> bool:
        """Whether it generates from a first frame."""
        return self.takes_image_latents or self.pins_first_frame

    @property
    def latent_channels(self) -> int:
        """Channels of a video's latents."""
        return self.networks["vae"]["z_dim"]

    @property
    def geometry(self) -> Geometry:
        """The videos that it takes."""
        # The VAE of Wan2.2 TI2V, the one that has a decoder of another width, halves once more.
        stride = 2 * SPATIAL_STRIDE if "dec_dim" in self.networks["vae"] else SPATIAL_STRIDE
        # The denoiser takes patches of the latents.
        return Geometry(TEMPORAL_STRIDE, stride, stride * self.networks["denoiser"]["patch_size"][1])
