"""The decoder of the Wan VAE with a gradient to the latents, for all frames of a clip at once or in chunks.

diffsynth decodes one latent frame after another and passes each causal convolution its previous input frames. With the
whole clip in memory, these frames are part of the input: each layer is one convolution, and no caches are copied in
forward or backward. Decoding in chunks, with the caches as tensors, needs less memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from frostline.models.frozen_ops import convolution, empty_as, rms_norm_silu

if TYPE_CHECKING:
    from diffsynth.models.wan_video_vae import CausalConv3d, Resample, ResidualBlock, WanVideoVAE


def decode_clip(vae: WanVideoVAE, latents: Tensor) -> Tensor:
    """Decode like diffsynth's `VideoVAE_.decode` or `VideoVAE38_.decode`.

    Args:
        latents: (B, C, F, h, w), normalised.
    Returns:
        (B, 3, 4F - 3, H, W), not clamped.
    """
    return _decode(vae, latents, _Before())


def decode_chunk(vae: WanVideoVAE, latents: Tensor, caches: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """Decode the next latent frames of a clip; all chunks together equal `decode_clip`.

    Args:
        latents: (B, C, n, h, w), normalised; n is 1 for the first frame, and any number after it.
        caches: the caches that the previous call returned; empty for the first frame.
    Returns:
        video, (B, 3, 1, H, W) for the first frame and (B, 3, 4n, H, W) for others, not clamped; then the last input
        frames of every causal convolution, in the order of `VaeDecoderFirst`.
    """
    before = _Caches(caches)
    video = _decode(vae, latents, before)
    return video, *before.seen


class _Before:
    """The frames before the input of a causal convolution; none, if the input is the whole clip."""

    first = True

    def frames(self, layer: CausalConv3d, like: Tensor) -> int | Tensor:
        """Return the frames before the input of `layer`: a number of zero frames, or the last of the previous chunk."""
        return _frames_in_front(layer)

    def saw(self, layer: CausalConv3d, x: Tensor) -> None:
        """Record the input (B, C, T, H, W) of a convolution, which includes the preceding frames."""


class _Caches(_Before):
    """The last input frames of the convolutions in the previous chunk, in the order of execution, and in this chunk."""

    def __init__(self, caches: Sequence[Tensor]) -> None:
        self.first = not caches
        self.seen: list[Tensor] = []
        self._rest = iter(caches)

    def frames(self, layer: CausalConv3d, like: Tensor) -> int | Tensor:
        return _frames_in_front(layer) if self.first else next(self._rest).to(like.dtype)

    def saw(self, layer: CausalConv3d, x: Tensor) -> None:
        # A copy: a slice would keep the whole tensor in memory.
        self.seen.append(x[:, :, x.shape[2] - _frames_in_front(layer) :].clone())


def _decode(vae: WanVideoVAE, latents: Tensor, before: _Before) -> Tensor:
    from diffsynth.models.wan_video_vae import unpatchify

    decoder: Any = vae.model.decoder
    mean, scale = (part.to(latents).view(1, -1, 1, 1, 1) for part in vae.scale)
    x = latents / scale + mean
    if x.device.type == "cpu":
        # oneDNN's convolutions then do not convert from and to their own layout.
        x = x.contiguous(memory_format=torch.channels_last_3d)
    x = _convolved(decoder.conv1, _convolved_within(vae.model.conv2, x), before)
    x = _layers((*decoder.middle, *decoder.upsamples), x, before)
    norm, _, last = decoder.head
    x = _normed_and_convolved(norm, last, x, before)
    return unpatchify(x, math.isqrt(last.out_channels // 3))


def _layers(layers: tuple[nn.Module, ...], x: Tensor, before: _Before) -> Tensor:
    from diffsynth.models.wan_video_vae import Resample, ResidualBlock, Up_ResidualBlock

    for layer in layers:
        if isinstance(layer, ResidualBlock):
            x = _residual_block(layer, x, before)
        elif isinstance(layer, Resample):
            x = _upsampled(layer, x, before)
        elif isinstance(layer, Up_ResidualBlock):
            inner = _layers(tuple(layer.upsamples), x, before)
            x = inner if layer.avg_shortcut is None else inner + layer.avg_shortcut(x, before.first)
        else:  # attention, within a frame
            x = layer(x)
    return x


def _residual_block(block: ResidualBlock, x: Tensor, before: _Before) -> Tensor:
    norm, _, convolution_, next_norm, _, _, next_convolution = cast(Any, block.residual)
    shortcut = x if isinstance(block.shortcut, nn.Identity) else _convolved_within(block.shortcut, x)
    x = _normed_and_convolved(norm, convolution_, x, before)
    return _normed_and_convolved(next_norm, next_convolution, x, before).add_(shortcut)


def _upsampled(layer: Resample, x: Tensor, before: _Before) -> Tensor:
    """Double height and width and, for upsampling in time, return two frames for each frame except the first of the
    clip.
    """
    if layer.mode == "upsample3d":
        alone = 1 if before.first else 0
        if x.shape[2] > alone:
            doubled = _convolved(layer.time_conv, x[:, :, alone:], before)
            x = cast(Tensor, _InterleavedFrames.apply(x[:, :, :alone], doubled))
        else:
            before.saw(layer.time_conv, torch.zeros_like(x).repeat(1, 1, _frames_in_front(layer.time_conv), 1, 1))
    frames = _doubled(cast(Any, layer.resample)[1], x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


def _doubled(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Double the sides of (N, C, H, W) frames (nearest) and apply a 3×3 kernel, without creating the enlarged frames.

    The kernel's weights for two equal rows or columns can be added. Each of the four output pixels of an input pixel is
    therefore a convolution with its own 2×2 kernel: four products instead of nine.
    """
    kernels = _of_pairs(_of_pairs(layer.weight.float(), 2), 4).to(layer.weight.dtype)
    bias = None if layer.bias is None else layer.bias.repeat(4)
    windows = convolution(x, kernels.flatten(0, 2), bias, (1, 1), (1, 1), (1, 1))
    return cast(Tensor, _InterleavedPixels.apply(windows))


def _of_pairs(kernels: Tensor, axis: int) -> Tensor:
    """Convert kernels of size 3 along `axis` to kernels of size 2 for the first and the second of two equal entries:
    (2, …).
    """
    before, at, after = kernels.split(1, axis)
    return torch.stack([torch.cat([before, at + after], axis), torch.cat([before + at, after], axis)])


class _InterleavedPixels(torch.autograd.Function):
    """Convert (N, 2 columns × 2 rows × C, H + 1, W + 1) windows of 2×2 pixels to (N, C, 2H, 2W)."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor) -> Tensor:
        count, channels, height, width = windows.shape
        ctx.shape = windows.shape
        pixels = empty_as((count, channels // 4, 2 * height - 2, 2 * width - 2), windows)
        for pixel, window in _pixels_and_windows(pixels, windows):
            pixel.copy_(window)
        return pixels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        windows = empty_as(ctx.shape, gradients[0]).zero_()
        for pixel, window in _pixels_and_windows(gradients[0], windows):
            window.copy_(pixel)
        return windows


def _pixels_and_windows(pixels: Tensor, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    height, width = windows.shape[2] - 1, windows.shape[3] - 1
    kernels = windows.unflatten(1, (2, 2, -1))
    return [
        (
            pixels[:, :, row::2, column::2],
            kernels[:, column, row, :, row : row + height, column : column + width],
        )
        for row in (0, 1)
        for column in (0, 1)
    ]


class _InterleavedFrames(torch.autograd.Function):
    """Interleave (B, C, 0 or 1, H, W) and the two halves of the channels of each following frame to (B, C, T, H, W)."""

    @staticmethod
    def forward(ctx: Any, alone: Tensor, doubled: Tensor) -> Tensor:
        batch, channels, ctx.alone, height, width = alone.shape
        frames = empty_as((batch, channels, ctx.alone + 2 * doubled.shape[2], height, width), doubled)
        frames[:, :, : ctx.alone] = alone
        frames[:, :, ctx.alone :: 2], frames[:, :, ctx.alone + 1 :: 2] = doubled.chunk(2, dim=1)
        return frames

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        frames = gradients[0]
        batch, channels, count, height, width = frames.shape
        doubled = empty_as((batch, 2 * channels, count // 2, height, width), frames)
        doubled[:, :channels], doubled[:, channels:] = frames[:, :, ctx.alone :: 2], frames[:, :, ctx.alone + 1 :: 2]
        return frames[:, :, : ctx.alone], doubled


def _convolved(layer: CausalConv3d, x: Tensor, before: _Before) -> Tensor:
    front = before.frames(layer, x)
    if isinstance(front, Tensor):
        x = torch.cat([front, x], dim=2)
    elif front:
        x = F.pad(x, (0, 0, 0, 0, front, 0))
    before.saw(layer, x)
    return _convolved_within(layer, x)


def _normed_and_convolved(norm: Any, layer: CausalConv3d, x: Tensor, before: _Before) -> Tensor:
    x = rms_norm_silu(x, norm.gamma, before.frames(layer, x))
    before.saw(layer, x)
    return _convolved_within(layer, x)


def _frames_in_front(layer: CausalConv3d) -> int:
    return int(layer._padding[4])


def _convolved_within(layer: CausalConv3d, x: Tensor) -> Tensor:
    """Convolve frames that already include the preceding ones."""
    padding = (0, int(layer._padding[2]), int(layer._padding[0]))
    return convolution(x, layer.weight, layer.bias, layer.stride, padding, layer.dilation)
