"""The Wan VAE while it is live, for any batch, around diffsynth's `WanVideoVAE`."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffsynth.models.wan_video_vae import WanVideoVAE

# Temporal compression: one latent frame for the first video frame, then one for every four.
TEMPORAL_STRIDE = 4
# Height and width of a video: the VAE halves them three times and the denoiser takes 2x2 patches of the latents.
SPATIAL_MULTIPLE = 16


def decode_latents(vae: WanVideoVAE, latents: Tensor) -> Tensor:
    """Decode (B, C, F, h, w) normalised latents, gradient on, to a video (B, 3, 4F - 3, 8h, 8w) in [-1, 1]."""
    video = vae.model.decode(latents, vae.scale)
    # Else diffsynth's lists would keep the last activations, and their graph, until the next call.
    vae.model.clear_cache()
    return video.clamp(-1, 1)


def use_onednn_conv3d(module: nn.Module) -> None:
    """Let every fp32 `Conv3d` in `module` run in oneDNN on a CPU, whatever the batch.

    At batch 1 torch picks a slow path of its own: about five times slower, same numbers to 1e-6.
    """
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv3d):
            convolution._conv_forward = types.MethodType(_onednn_conv3d, convolution)


def _onednn_conv3d(self: nn.Conv3d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    on_cpu = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32
    # autocast acts on the public operator only, and a tracer must see that one too.
    if not on_cpu or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
    padding = cast(tuple[int, ...], self.padding)
    return torch.mkldnn_convolution(input, weight, bias, padding, self.stride, self.dilation, self.groups)
