"""The decoder of the Wan VAE over all frames of a clip at once, with a gradient to the latents.

diffsynth decodes one latent frame after another and hands each causal convolution what it saw last. With the whole clip
at hand, the frames before are simply there: one convolution a layer, and no copies of caches in forward or backward.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from frostline.models.frozen import convolution, empty_as, rms_norm_silu

if TYPE_CHECKING:
    from diffsynth.models.wan_video_vae import CausalConv3d, Resample, ResidualBlock, WanVideoVAE


def decode_clip(vae: WanVideoVAE, latents: Tensor) -> Tensor:
    """`VideoVAE_.decode` of diffsynth, for both of its decoders.

    Args:
        latents: (B, C, F, h, w), normalised.
    Returns:
        (B, 3, 4F - 3, H, W), not clamped.
    """
    from diffsynth.models.wan_video_vae import unpatchify

    decoder: Any = vae.model.decoder
    mean, scale = (part.to(latents).view(1, -1, 1, 1, 1) for part in vae.scale)
    x = latents / scale + mean
    if x.device.type == "cpu":
        # oneDNN's convolutions then neither read nor write a layout of their own.
        x = x.contiguous(memory_format=torch.channels_last_3d)
    x = _convolved(decoder.conv1, _convolved(vae.model.conv2, x))
    x = _layers((*decoder.middle, *decoder.upsamples), x)
    norm, _, last = decoder.head
    x = _normed_and_convolved(norm, last, x)
    return unpatchify(x, math.isqrt(last.out_channels // 3))


def _layers(layers: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    from diffsynth.models.wan_video_vae import Resample, ResidualBlock, Up_ResidualBlock

    for layer in layers:
        if isinstance(layer, ResidualBlock):
            x = _residual_block(layer, x)
        elif isinstance(layer, Resample):
            x = _upsampled(layer, x)
        elif isinstance(layer, Up_ResidualBlock):
            inner = _layers(tuple(layer.upsamples), x)
            x = inner if layer.avg_shortcut is None else inner + layer.avg_shortcut(x, True)
        else:  # attention, within a frame
            x = layer(x)
    return x


def _residual_block(block: ResidualBlock, x: Tensor) -> Tensor:
    norm, _, convolution_, next_norm, _, _, next_convolution = cast(Any, block.residual)
    shortcut = x if isinstance(block.shortcut, nn.Identity) else _convolved(block.shortcut, x)
    x = _normed_and_convolved(norm, convolution_, x)
    return _normed_and_convolved(next_norm, next_convolution, x).add_(shortcut)


def _upsampled(layer: Resample, x: Tensor) -> Tensor:
    """Twice the height and width, and where it does so in time, two frames of each but the first."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        doubled = _convolved(layer.time_conv, x[:, :, 1:])
        x = cast(Tensor, _InterleavedFrames.apply(x[:, :, :1], doubled))
    frames = _doubled(cast(Any, layer.resample)[1], x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


def _doubled(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The 3×3 convolution of (N, C, H, W) frames enlarged twice (nearest), without the enlarged frames.

    Where two rows are equal, the kernel's weights for them add up. So each of the four pixels that one becomes is a
    convolution with a 2×2 kernel of its own: four products of nine.
    """
    kernels = _of_pairs(_of_pairs(layer.weight.float(), 2), 4).to(layer.weight.dtype)
    bias = None if layer.bias is None else layer.bias.repeat(4)
    windows = convolution(x, kernels.flatten(0, 2), bias, (1, 1), (1, 1), (1, 1))
    return cast(Tensor, _InterleavedPixels.apply(windows))


def _of_pairs(kernels: Tensor, axis: int) -> Tensor:
    """Kernels of 3 along `axis` as those of 2 for the first and for the second of two equal entries: (2, …)."""
    before, at, after = kernels.split(1, axis)
    return torch.stack([torch.cat([before, at + after], axis), torch.cat([before + at, after], axis)])


class _InterleavedPixels(torch.autograd.Function):
    """(N, 2 columns × 2 rows × C, H + 1, W + 1) windows of 2×2 pixels to (N, C, 2H, 2W)."""

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
    """The first frame (B, C, 1, H, W), then two of each that follows, the halves of its channels: (B, 2C, T, H, W)."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, doubled: Tensor) -> Tensor:
        batch, channels, _, height, width = first.shape
        frames = empty_as((batch, channels, 1 + 2 * doubled.shape[2], height, width), doubled)
        frames[:, :, :1] = first
        frames[:, :, 1::2], frames[:, :, 2::2] = doubled.chunk(2, dim=1)
        return frames

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        frames = gradients[0]
        batch, channels, count, height, width = frames.shape
        doubled = empty_as((batch, 2 * channels, count // 2, height, width), frames)
        doubled[:, :channels], doubled[:, channels:] = frames[:, :, 1::2], frames[:, :, 2::2]
        return frames[:, :, :1], doubled


def _convolved(layer: CausalConv3d, x: Tensor) -> Tensor:
    front = _frames_in_front(layer)
    return _convolved_within(layer, F.pad(x, (0, 0, 0, 0, front, 0)) if front else x)


def _normed_and_convolved(norm: Any, layer: CausalConv3d, x: Tensor) -> Tensor:
    return _convolved_within(layer, rms_norm_silu(x, norm.gamma, _frames_in_front(layer)))


def _frames_in_front(layer: CausalConv3d) -> int:
    return int(layer._padding[4])


def _convolved_within(layer: CausalConv3d, x: Tensor) -> Tensor:
    """The convolution of frames that have what comes before them already."""
    padding = (0, int(layer._padding[2]), int(layer._padding[0]))
    return convolution(x, layer.weight, layer.bias, layer.stride, padding, layer.dilation)
