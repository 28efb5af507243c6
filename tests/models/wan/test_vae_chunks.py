"""Encoding and decoding in chunks compared with diffsynth's own loop, for both of Wan's VAEs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from frostline.models.checkpoints.loading import load_components
from frostline.models.wan.vae_chunks import (
    VaeDecoderFirst,
    VaeDecoderNext,
    VaeEncoderFirst,
    VaeEncoderNext,
    decode_in_chunks,
    encode_in_chunks,
)

LENGTHS = [1, 5, 9, 17]


def random_video(frames: int, batch: int = 1, size: tuple[int, int] = (32, 48)) -> Tensor:
    return 2 * torch.rand(batch, 3, frames, *size, generator=torch.Generator().manual_seed(frames)) - 1


def random_latents(frames: int, channels: int = 16, batch: int = 1) -> Tensor:
    return torch.randn(batch, channels, frames, 4, 6, generator=torch.Generator().manual_seed(frames))


def network(module: torch.nn.Module, takes: str, gives: str) -> Any:
    """Return a function like an engine: caches are passed from one call to the next by name."""

    def run(**inputs: Tensor) -> dict[str, Tensor]:
        chunk = inputs.pop(takes)
        result, *caches = module(chunk, *(inputs[name] for name in sorted(inputs)))
        return {gives: result, **{f"next_cache_{i:02d}": cache for i, cache in enumerate(caches)}}

    return run


@torch.no_grad()
def encode(vae: Any, video: Tensor) -> Tensor:
    modules = {"first": VaeEncoderFirst(vae), "next": VaeEncoderNext(vae)}
    return encode_in_chunks({name: network(each, "video", "latents") for name, each in modules.items()}, video)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    modules = {"first": VaeDecoderFirst(vae), "next": VaeDecoderNext(vae)}
    return decode_in_chunks({name: network(each, "latents", "video") for name, each in modules.items()}, latents)


@pytest.mark.parametrize("frames", LENGTHS)
def test_encoding_is_diffsynths_encode(vae: Any, frames: int) -> None:
    video = random_video(frames)
    latents = encode(vae, video)
    assert latents.shape == (1, 16, (frames - 1) // 4 + 1, 4, 6)
    assert torch.equal(latents, vae.model.encode(video, vae.scale))


@pytest.mark.parametrize("frames", LENGTHS)
def test_encoding_with_the_wan22_vae(vae38: Any, frames: int) -> None:
    video = random_video(frames, size=(64, 32))
    latents = encode(vae38, video)
    assert latents.shape == (1, 8, (frames - 1) // 4 + 1, 4, 2)
    torch.testing.assert_close(latents, vae38.model.encode(video, vae38.scale), atol=1e-6, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_decoding_is_diffsynths_decode(vae: Any, frames: int) -> None:
    latents = random_latents(frames)
    video = decode(vae, latents)
    assert video.shape == (1, 3, 4 * frames - 3, 32, 48)
    with torch.no_grad():
        expected = vae.model.decode(latents, vae.scale).clamp(-1, 1)
    torch.testing.assert_close(video, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_decoding_with_the_wan22_vae(vae38: Any, frames: int) -> None:
    latents = random_latents(frames, channels=8)
    video = decode(vae38, latents)
    assert video.shape == (1, 3, 4 * frames - 3, 64, 96)
    with torch.no_grad():
        expected = vae38.model.decode(latents, vae38.scale).clamp(-1, 1)
    torch.testing.assert_close(video, expected, atol=1e-6, rtol=0)


def test_every_chunk_sees_those_before(vae: Any) -> None:
    """Change one chunk: if its caches were lost, the later chunks would not change."""
    video, other = random_video(9), random_video(9)
    other[:, :, 3:5] *= -1
    change = (encode(vae, video) - encode(vae, other)).abs().amax((0, 1, 3, 4))
    assert change[0] == 0
    assert (change[1:] > 1e-3).all()
    latents, others = random_latents(3), random_latents(3)
    others[:, :, 1] *= -1
    change = (decode(vae, latents) - decode(vae, others)).abs().amax((0, 1, 3, 4))
    assert change[0] == 0
    assert (change[1:] > 1e-3).all()


def test_no_cache_is_left_in_the_vae(vae: Any) -> None:
    video, latents = random_video(5), random_latents(2)
    with torch.no_grad():
        before = vae.model.encode(video, vae.scale), vae.model.decode(latents, vae.scale)
        encode(vae, random_video(9, size=(48, 32)))
        decode(vae, random_latents(3))
        assert torch.equal(vae.model.encode(video, vae.scale), before[0])
        assert torch.equal(vae.model.decode(latents, vae.scale), before[1])


def test_a_batch_is_each_of_its_samples(vae: Any) -> None:
    videos, latents = random_video(5, batch=3), random_latents(2, batch=3)
    torch.testing.assert_close(
        encode(vae, videos), torch.cat([encode(vae, video[None]) for video in videos]), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(
        decode(vae, latents), torch.cat([decode(vae, each[None]) for each in latents]), atol=8e-6, rtol=0
    )


def test_the_type_of_the_weights_is_kept() -> None:
    vae = load_components("tiny", torch.bfloat16).vae
    video, latents = random_video(5).bfloat16(), random_latents(2).bfloat16()
    encoded, decoded = encode(vae, video), decode(vae, latents)
    assert encoded.dtype == decoded.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(encoded, vae.model.encode(video, vae.scale))
        assert torch.equal(decoded, vae.model.decode(latents, vae.scale).clamp(-1, 1))
