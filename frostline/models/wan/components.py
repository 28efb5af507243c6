"""What a Wan model consists of, as diffsynth's own objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from diffsynth.models.wan_video_dit import WanModel
    from diffsynth.models.wan_video_image_encoder import WanImageEncoder
    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer, WanTextEncoder
    from diffsynth.models.wan_video_vae import WanVideoVAE
    from torch import nn

    from frostline.models.lazy_weights import PartWeights


@dataclass(frozen=True)
class WanComponents:
    """A loaded Wan model; all its parts are frozen and in eval mode.

    name: names the model in the engine store.
    boundary: the high-noise expert serves timesteps from `boundary * 1000` up; of no effect without one.
    weights: by stage name, the weights of frozen parts that may leave memory and come back.
    license: of the weights, as the model card states it: an SPDX identifier; None where it states none.
    """

    name: str
    text_encoder: WanTextEncoder
    tokenizer: HuggingfaceTokenizer
    vae: WanVideoVAE
    denoiser: WanModel
    denoiser_high_noise: WanModel | None = None
    image_encoder: WanImageEncoder | None = None
    boundary: float = 0.9
    weights: Mapping[str, PartWeights] = field(default_factory=dict)
    license: str | None = None

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The neural networks that are there, by field name."""
        for name in ("text_encoder", "vae", "denoiser", "denoiser_high_noise", "image_encoder"):
            module = getattr(self, name)
            if module is not None:
                yield name, module

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.denoiser.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser, whose latents and conditions are of it too."""
        return self.denoiser.patch_embedding.weight.dtype

    @property
    def takes_image_latents(self) -> bool:
        """Whether the denoiser is conditioned on `y`: the mask and latents of the first frame."""
        return self.denoiser.require_vae_embedding and self.denoiser.in_dim > self.vae.model.z_dim

    @property
    def takes_clip_feature(self) -> bool:
        """Whether the denoiser is conditioned on the CLIP feature of the first frame."""
        return self.denoiser.has_image_input and self.denoiser.require_clip_embedding

    @property
    def pins_first_frame(self) -> bool:
        """Whether the first frame's latents are given and kept through sampling (Wan2.2 TI2V)."""
        return self.denoiser.seperated_timestep and self.denoiser.fuse_vae_embedding_in_latents

    @property
    def text_length(self) -> int:
        """Tokens in a text context; prompts are padded or cut to it."""
        length = self.tokenizer.seq_len
        assert length is not None
        return length

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent, in height and width."""
        return self.vae.upsampling_factor

    @property
    def spatial_multiple(self) -> int:
        """Height and width of a video are multiples of it: the denoiser takes 2×2 patches of the latents."""
        return self.spatial_stride * self.denoiser.patch_size[1]
