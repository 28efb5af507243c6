"""The Wan VAE as frozen encoder and live decoder, for any batch, around diffsynth's `WanVideoVAE`."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from diffsynth.models.wan_video_vae import WanVideoVAE

# Temporal compression: one latent frame for the first video frame, then one for every four.
TEMPORAL_STRIDE = 4
# Height and width of a video: the VAE halves them three times and the denoiser takes 2x2 patches of the latents.
# The VAE of Wan2.2 TI2V halves once more: `WanComponents.spatial_multiple` is what a model wants.
SPATIAL_MULTIPLE = 16

EncoderNetworks = Mapping[str, Callable[..., dict[str, Tensor]]]


class VaeEncoderFirst(nn.Module):
    """Encode the first frame of a video; the caches let `VaeEncoderNext` go on from it.

    The causal convolutions of the Wan VAE look back two frames. diffsynth keeps what they saw in lists inside the
    module; here it enters and leaves as tensors, so that two static graphs serve a video of any length.
    """

    def __init__(self, vae: WanVideoVAE) -> None:
        from diffsynth.models.wan_video_vae import count_conv3d

        super().__init__()
        self.encoder = vae.model.encoder
        self.to_moments = vae.model.conv1
        # 2 for the Wan2.2 TI2V VAE, which folds 2×2 pixels into channels, else 1.
        self.spatial_patch = math.isqrt(self.encoder.conv1.in_channels // 3)
        mean, scale = vae.scale
        self.register_buffer("mean", mean.view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, -1, 1, 1, 1), persistent=False)
        self.slots = count_conv3d(self.encoder)
        self.cached_slots, self.cache_depths = self._probe()

    @torch.no_grad()
    def _probe(self) -> tuple[list[int], list[int]]:
        """Which slots of diffsynth's cache list are in use, and how many frames each holds from the second chunk on."""
        weight = self.to_moments.weight
        caches: list[Tensor | None] = [None] * self.slots
        for frames in (1, TEMPORAL_STRIDE):
            self._encode(torch.zeros(1, 3, frames, 32, 32, dtype=weight.dtype, device=weight.device), caches)
        in_use = [(slot, cache.shape[2]) for slot, cache in enumerate(caches) if cache is not None]
        return [slot for slot, _ in in_use], [depth for _, depth in in_use]

    def _encode(self, video: Tensor, caches: list[Tensor | None]) -> Tensor:
        """Normalised latents of one chunk; `caches` is updated in place."""
        hidden, _, _ = self.encoder(_patchify(video, self.spatial_patch), feat_cache=caches, feat_idx=[0])
        mean = self.to_moments(hidden).chunk(2, dim=1)[0]
        return (mean - self.mean.to(mean.dtype)) * self.scale.to(mean.dtype)

    def forward(self, video: Tensor) -> tuple[Tensor, ...]:
        """Encode (B, 3, 1, H, W) in [-1, 1].

        Returns:
            latents (B, C, 1, H/8, W/8), then one cache for every causal convolution.
        """
        slots: list[Tensor | None] = [None] * self.slots
        latents = self._encode(video, slots)
        caches = [cache for cache in slots if cache is not None]
        # Zeros in front are what the convolutions themselves would pad with.
        padded = [
            F.pad(cache, (0, 0, 0, 0, depth - cache.shape[2], 0))
            for cache, depth in zip(caches, self.cache_depths, strict=True)
        ]
        return (latents, *padded)


class VaeEncoderNext(VaeEncoderFirst):
    """Encode the next four frames of a video."""

    def forward(self, video: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Encode (B, 3, 4, H, W) in [-1, 1].

        Args:
            caches: what the chunk before returned behind its latents.
        Returns:
            latents (B, C, 1, H/8, W/8), then the caches for the next chunk.
        """
        slots: list[Tensor | None] = [None] * self.slots
        for slot, cache in zip(self.cached_slots, caches, strict=True):
            slots[slot] = cache
        latents = self._encode(video, slots)
        return (latents, *(cache for cache in slots if cache is not None))


def encode_video(networks: EncoderNetworks, video: Tensor) -> Tensor:
    """Encode a whole video chunk by chunk; equal to `VideoVAE_.encode` of diffsynth.

    Args:
        networks: "first" and "next", taking `video=`, "next" also `cache_NN=`; both return `latents` and
            `next_cache_NN`.
        video: (B, 3, T, H, W) in [-1, 1] with T = 4k + 1.
    Returns:
        (B, C, k + 1, H/8, W/8) normalised latents.
    """
    outputs = networks["first"](video=video[:, :, :1].contiguous())
    latents = [outputs.pop("latents")]
    for start in range(1, video.shape[2], TEMPORAL_STRIDE):
        caches = {name.removeprefix("next_"): cache for name, cache in outputs.items()}
        chunk = video[:, :, start : start + TEMPORAL_STRIDE].contiguous()
        outputs = networks["next"](video=chunk, **caches)
        latents.append(outputs.pop("latents"))
    return torch.cat(latents, dim=2)


def decode_latents(vae: WanVideoVAE, latents: Tensor, checkpoint_frames: bool = False) -> Tensor:
    """Decode (B, C, F, h, w) normalised latents, gradient on, to a video (B, 3, 4F - 3, 8h, 8w) in [-1, 1].

    Args:
        checkpoint_frames: keep for backward only what passes from one latent frame to the next, and recompute the
            rest: 22 GB instead of 154 GB for 81 frames of 480×480 in bf16.
    """
    if checkpoint_frames and torch.is_grad_enabled():
        return _decode_by_frame(vae, latents).clamp(-1, 1)
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
    on_cpu = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32
    # autocast acts on the public operator only, and a tracer must see that one too.
    if not on_cpu or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
    padding = cast(tuple[int, ...], self.padding)
    return torch.mkldnn_convolution(input, weight, bias, padding, self.stride, self.dilation, self.groups)


def _patchify(video: Tensor, patch: int) -> Tensor:
    from diffsynth.models.wan_video_vae import patchify

    return patchify(video, patch)
