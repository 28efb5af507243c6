"""The Wan VAE in chunks: stateless networks that encode and decode videos of any length.

The causal convolutions of the VAE use the two preceding frames. diffsynth stores these in lists inside the module; here
they are input and output tensors. One network processes the first frame, another each following group of four frames.
Shapes are those of the VAE of Wan2.1; for Wan2.2 TI2V, the spatial stride is 16 instead of 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.models.wan.video_shape import TEMPORAL_STRIDE

if TYPE_CHECKING:
    from diffsynth.models.wan_video_vae import WanVideoVAE

ChunkNetworks = Mapping[str, Callable[..., dict[str, Tensor]]]

# The content of diffsynth's cache list: a tensor, None, or "Rep" for an upsampling layer that did not change the first
# frame.
_Slot = Tensor | str | None


class _VaeChunk(nn.Module):
    """Common base of encoder and decoder: the statistics of the latents, and the list of caches.

    `_run` computes one chunk, (B, C, frames, H, W) to another (B, C, frames, H, W), and updates `slots` in place.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, vae: WanVideoVAE, half: nn.Module) -> None:
        from diffsynth.models.wan_video_vae import count_conv3d

        super().__init__()
        mean, scale = vae.scale
        self.register_buffer("mean", mean.view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, -1, 1, 1, 1), persistent=False)
        self._slots = count_conv3d(half)

    def _run(self, chunk: Tensor, slots: list[_Slot]) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def _probe(self, first: Tensor, following: Tensor) -> None:
        """Determine which slots are in use, and the shapes of their caches from the second chunk on."""
        slots: list[_Slot] = [None] * self._slots
        for chunk in (first, following):
            self._run(chunk, slots)
        caches = [(slot, cache) for slot, cache in enumerate(slots) if isinstance(cache, Tensor)]
        self._in_use = [slot for slot, _ in caches]
        # Channels, frames, and the ratio of the cache's height to the chunk's height.
        self.cache_shapes = [(cache.shape[1], cache.shape[2], cache.shape[3] / first.shape[3]) for _, cache in caches]

    def _probed_on(self, other: _VaeChunk) -> None:
        """Copy the results of `_probe` from a chunk of the same sizes."""
        self._in_use, self.cache_shapes = other._in_use, other.cache_shapes

    def _first(self, chunk: Tensor) -> tuple[Tensor, ...]:
        slots: list[_Slot] = [None] * self._slots
        output = self._run(chunk, slots)
        caches = [
            self._padded(slots[slot], chunk, *shape)
            for slot, shape in zip(self._in_use, self.cache_shapes, strict=True)
        ]
        return (output, *caches)

    def _padded(self, cache: _Slot, chunk: Tensor, channels: int, frames: int, per_pixel: float) -> Tensor:
        """Prepend zeros up to the number of frames of later caches, like the convolutions' own padding."""
        if isinstance(cache, Tensor):
            return F.pad(cache, (0, 0, 0, 0, frames - cache.shape[2], 0))
        up = round(per_pixel)
        return chunk.new_zeros(chunk.shape[0], channels, frames, up * chunk.shape[3], up * chunk.shape[4])

    def _next(self, chunk: Tensor, caches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        slots: list[_Slot] = [None] * self._slots
        for slot, cache in zip(self._in_use, caches, strict=True):
            slots[slot] = cache
        output = self._run(chunk, slots)
        return (output, *(cache for cache in slots if isinstance(cache, Tensor)))


class VaeEncoderFirst(_VaeChunk):
    """Encode the first frame of a video; `VaeEncoderNext` continues with its caches.

    Args:
        sizes: a VAE of the same sizes on the meta device, if the encoder's weights are not in memory.
    """

    def __init__(self, vae: WanVideoVAE, sizes: WanVideoVAE | None = None) -> None:
        super().__init__(vae, vae.model.encoder)
        self.encoder = vae.model.encoder
        self.to_moments = vae.model.conv1
        # 2 for the Wan2.2 TI2V VAE, which folds 2×2 pixels into channels; otherwise 1.
        self.spatial_patch = math.isqrt(self.encoder.conv1.in_channels // 3)
        if sizes is not None:
            self._probed_on(type(self)(sizes))
            return
        frame = self.to_moments.weight.new_zeros(1, 3, 1, 32, 32)
        self._probe(frame, frame.expand(-1, -1, TEMPORAL_STRIDE, -1, -1))

    def _run(self, chunk: Tensor, slots: list[_Slot]) -> Tensor:
        from diffsynth.models.wan_video_vae import patchify

        hidden, _, _ = self.encoder(patchify(chunk, self.spatial_patch), feat_cache=slots, feat_idx=[0])
        mean = self.to_moments(hidden).chunk(2, dim=1)[0]
        return (mean - self.mean.to(mean.dtype)) * self.scale.to(mean.dtype)

    def forward(self, video: Tensor) -> tuple[Tensor, ...]:
        """Encode (B, 3, 1, H, W) in [-1, 1].

        Returns:
            latents (B, C, 1, H/8, W/8), then one cache for every causal convolution.
        """
        return self._first(video)


class VaeEncoderNext(VaeEncoderFirst):
    """Encode the next four frames of a video."""

    def forward(self, video: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Encode (B, 3, 4, H, W) in [-1, 1].

        Args:
            caches: the caches that the previous chunk returned.
        Returns:
            latents (B, C, 1, H/8, W/8), then the caches for the next chunk.
        """
        return self._next(video, caches)


class VaeDecoderFirst(_VaeChunk):
    """Decode the first latent frame of a video; `VaeDecoderNext` continues with its caches.

    Args:
        sizes: see `VaeEncoderFirst`.
    """

    def __init__(self, vae: WanVideoVAE, sizes: WanVideoVAE | None = None) -> None:
        super().__init__(vae, vae.model.decoder)
        self.decoder = vae.model.decoder
        self.from_latents = vae.model.conv2
        # As in the encoder. With patches, the decoder takes a flag for the first chunk.
        last = self.decoder.head[-1]
        assert isinstance(last, nn.Conv3d)
        self.spatial_patch = math.isqrt(last.out_channels // 3)
        if sizes is not None:
            self._probed_on(type(self)(sizes))
            return
        weight = self.from_latents.weight
        latents = weight.new_zeros(1, weight.shape[1], 1, 4, 4)
        self._probe(latents, latents)

    def _run(self, chunk: Tensor, slots: list[_Slot]) -> Tensor:
        from diffsynth.models.wan_video_vae import unpatchify

        hidden = self.from_latents(chunk / self.scale.to(chunk.dtype) + self.mean.to(chunk.dtype))
        which: dict[str, Any] = {"first_chunk": slots[0] is None} if self.spatial_patch > 1 else {}
        video, _, _ = self.decoder(hidden, feat_cache=slots, feat_idx=[0], **which)
        return unpatchify(video, self.spatial_patch).clamp(-1, 1)

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Decode (B, C, 1, h, w) normalised latents.

        Returns:
            video (B, 3, 1, 8h, 8w) in [-1, 1], then one cache for every causal convolution.
        """
        return self._first(latents)


class VaeDecoderNext(VaeDecoderFirst):
    """Decode the next latent frame of a video."""

    def forward(self, latents: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Decode (B, C, 1, h, w) normalised latents.

        Args:
            caches: the caches that the previous chunk returned.
        Returns:
            video (B, 3, 4, 8h, 8w) in [-1, 1], then the caches for the next chunk.
        """
        return self._next(latents, caches)


def encode_in_chunks(networks: ChunkNetworks, video: Tensor) -> Tensor:
    """Encode a whole video; equal to `VideoVAE_.encode` of diffsynth.

    Args:
        networks: "first" and "next", taking `video=`, "next" also `cache_NN=`; both return `latents` and
            `next_cache_NN`.
        video: (B, 3, T, H, W) in [-1, 1] with T = 4k + 1.
    Returns:
        (B, C, k + 1, H/8, W/8) normalised latents.
    """
    first, following = video[:, :, :1], video[:, :, 1:].split(TEMPORAL_STRIDE, dim=2)
    return _in_chunks(networks, "video", (first, *(() if video.shape[2] == 1 else following)), "latents")


def decode_in_chunks(networks: ChunkNetworks, latents: Tensor, caches: Mapping[str, Tensor] | None = None) -> Tensor:
    """Decode all latents of a clip; equal to diffsynth's `VideoVAE_.decode`, clamped.

    Args:
        networks: "first" and "next", taking `latents=`, "next" also `cache_NN=`; both return `video` and
            `next_cache_NN`.
        latents: (B, C, F, h, w), normalised.
        caches: the caches after the preceding frames, from `decoder_caches`; None if these latents are the first.
    Returns:
        (B, 3, 4F - 3, 8h, 8w) in [-1, 1]; 4F frames if there are preceding frames.
    """
    return _in_chunks(networks, "latents", latents.split(1, dim=2), "video", caches)


def decoder_caches(networks: ChunkNetworks, latents: Tensor) -> dict[str, Tensor]:
    """Decode the leading latent frames of a clip to obtain the caches for decoding the following frames.

    Args:
        networks: see `decode_in_chunks`.
        latents: (B, C, F, h, w), normalised, F of at least 1.
    Returns:
        `cache_NN`, as the network "next" takes them.
    """
    caches: dict[str, Tensor] | None = None
    for chunk in latents.split(1, dim=2):
        outputs = _one_chunk(networks, "latents", chunk, caches)
        del outputs["video"]
        caches = _as_inputs(outputs)
    assert caches is not None
    return caches


def _in_chunks(
    networks: ChunkNetworks,
    takes: str,
    chunks: tuple[Tensor, ...],
    gives: str,
    caches: Mapping[str, Tensor] | None = None,
) -> Tensor:
    results = []
    for chunk in chunks:
        outputs = _one_chunk(networks, takes, chunk, caches)
        results.append(outputs.pop(gives))
        caches = _as_inputs(outputs)
    return torch.cat(results, dim=2)


def _one_chunk(
    networks: ChunkNetworks, takes: str, chunk: Tensor, caches: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    if caches is None:
        return networks["first"](**{takes: chunk.contiguous()})
    return networks["next"](**{takes: chunk.contiguous()}, **caches)


def _as_inputs(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the caches of a chunk by their input names in the next chunk."""
    return {name.removeprefix("next_"): cache for name, cache in outputs.items()}
