"""Create networks of diffsynth's classes from the arguments for their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from frostline.deferred_init import deferred_init

if TYPE_CHECKING:
    from torch import nn


def build_network(field: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Return a network of this size, with the initial weights of its constructor.

    Args:
        field: its name in `WanComponents`.
        arguments: see `ModelSpec.networks`.
    """
    with deferred_init("diffsynth"):
        return _BUILDERS[field](**arguments)


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


_BUILDERS: Mapping[str, Callable[..., nn.Module]] = {
    "text_encoder": _text_encoder,
    "vae": _vae,
    "denoiser": _denoiser,
    "denoiser_high_noise": _denoiser,
    "image_encoder": _image_encoder,
}
# The fields of `WanComponents` that are networks, in the order of processing.
NETWORKS = tuple(_BUILDERS)
