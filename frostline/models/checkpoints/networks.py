"""diffsynth's classes from the arguments that say how large they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from frostline.deferred_init import deferred_init
from frostline.models.checkpoints.formats.names import Part

if TYPE_CHECKING:
    from torch import nn


def build_network(part: Part, arguments: Mapping[str, Any]) -> nn.Module:
    """A network of this size, with whatever weights its constructor gives it.

    Args:
        arguments: as `network_arguments` returns them.
    """
    with deferred_init("diffsynth"):
        return _BUILDERS[part](**arguments)


def _denoiser(**arguments: Any) -> nn.Module:
    from diffsynth.models.wan_video_dit import WanModel

    return WanModel(**arguments)


def _text_encoder(**arguments: Any) -> nn.Module:
    from diffsynth.models.wan_video_text_encoder import WanTextEncoder

    return WanTextEncoder(**arguments)


def _vae(**arguments: Any) -> nn.Module:
    from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_, WanVideoVAE, WanVideoVAE38

    # Only the VAE of Wan2.2 TI2V has a decoder of another width.
    folded = "dec_dim" in arguments
    vae: Any = WanVideoVAE38() if folded else WanVideoVAE()
    vae.model = (VideoVAE38_ if folded else VideoVAE_)(**arguments)
    return vae


def _image_encoder(layers: int) -> nn.Module:
    from diffsynth.models.wan_video_image_encoder import WanImageEncoder

    encoder: Any = WanImageEncoder()
    visual = encoder.model.visual
    visual.transformer = visual.transformer[:layers]
    return encoder


_BUILDERS = {"denoiser": _denoiser, "text_encoder": _text_encoder, "vae": _vae, "image_encoder": _image_encoder}
