"""The Wan VAE while it is live, for any batch, around diffsynth's `WanVideoVAE`."""

from __future__ import annotations

import math
import types
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frostline.models.frozen import convolve
from frostline.models.vae_clip import decode_clip

if TYPE_CHECKING:
    from diffsynth.models.wan_video_vae import WanVideoVAE


def decode_latents(vae: WanVideoVAE, latents: Tensor, checkpoint_frames: bool = False) -> Tensor:
    """Decode (B, C, F, h, w) normalised latents, gradient on, to a video (B, 3, 4F - 3, 8h, 8w) in [-1, 1].

    With a gradient to compute and nothing to recompute, all frames are decoded at once (`decode_clip`).

    Args:
        checkpoint_frames: keep for backward only what passes from one latent frame to the next, and recompute the
            rest: 22 GB instead of 40 GB for 81 frames of 480×480 in bf16 (diffsynth's loop keeps 154 GB).
    """
    if torch.is_grad_enabled():
        return (_decode_by_frame if checkpoint_frames else decode_clip)(vae, latents).clamp(-1, 1)
    video = vae.model.decode(latents, vae.scale)
    # Else diffsynth's lists would keep the last activations, and their graph, until the next call.
    vae.model.clear_cache()
    return video.clamp(-1, 1)


def _decode_by_frame(vae: WanVideoVAE, latents: Tensor) -> Tensor:
    """`VideoVAE_.decode` of diffsynth with its caches passed on, so that each latent frame can be recomputed alone."""
    from diffsynth.models.wan_video_vae import count_conv3d, unpatchify

    model = vae.model
    mean, scale = (part.to(latents).view(1, -1, 1, 1, 1) for part in vae.scale)
    hidden = model.conv2(latents / scale + mean)
    # Only the decoder of Wan2.2 TI2V, which unfolds 2×2 pixels from its channels, is told which frame is the first.
    patch = math.isqrt(cast(Any, model.decoder.head[-1]).out_channels // 3)
    caches: list[Any] = [None] * count_conv3d(model.decoder)
    frames = []
    for index in range(latents.shape[2]):
        told = {"first_chunk": True} if patch > 1 and index == 0 else {}

        def decode_frame(frame: Tensor, *before: Any, told: dict[str, bool] = told) -> tuple[Any, ...]:
            decoded, slots, _ = model.decoder(frame, feat_cache=list(before), feat_idx=[0], **told)
            return decoded, *slots

        # One by one, because `checkpoint` holds a list of tensors where an outer one wants them let go.
        decoded: Any = checkpoint(decode_frame, hidden[:, :, index : index + 1], *caches, use_reentrant=False)
        frames.append(decoded[0])
        caches = list(decoded[1:])
    return unpatchify(torch.cat(frames, dim=2), patch)


def use_onednn_conv3d(module: nn.Module) -> None:
    """Let every fp32 `Conv3d` in `module` run in oneDNN on a CPU, whatever the batch.

    At batch 1 torch picks a slow path of its own: about five times slower, same numbers to 1e-6.
    """
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv3d):
            convolution._conv_forward = types.MethodType(_onednn_conv3d, convolution)


def _onednn_conv3d(self: nn.Conv3d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = cast(tuple[int, ...], self.padding)
    return convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)
