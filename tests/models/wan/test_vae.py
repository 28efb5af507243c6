"""The live decoder and the fast convolution compared with diffsynth's own VAE."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoding import decoded_with_gradient, diffsynths
from torch import Tensor

from frostline.models.checkpoints.loading import load_components
from frostline.models.tiny.clips import held_out_clips
from frostline.models.wan.vae import decode_latents, use_onednn_conv3d
from frostline.models.wan.vae_chunks import VaeDecoderFirst, VaeDecoderNext
from frostline.models.wan.vae_decoder_full import decode_chunk


def random_video(frames: int, batch: int = 1, size: tuple[int, int] = (32, 48)) -> Tensor:
    return 2 * torch.rand(batch, 3, frames, *size, generator=torch.Generator().manual_seed(frames)) - 1


@torch.no_grad()
def test_decodes_to_pixels_within_range(vae: Any) -> None:
    latents = 6 * torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert vae.model.decode(latents, vae.scale).abs().max() > 1, (
        "latents this large must decode to values outside the range"
    )
    video = decode_latents(vae, latents)
    assert video.shape == (2, 3, 9, 32, 48)
    assert video.min() == -1
    assert video.max() == 1


@torch.no_grad()
def test_a_decoded_clip_is_the_clip(vae: Any) -> None:
    clip = held_out_clips(1, seed=5).video.transpose(1, 2) * 2 - 1
    decoded = decode_latents(vae, vae.model.encode(clip, vae.scale))
    psnr = 10 * torch.log10(4 / (decoded - clip).pow(2).mean())
    assert psnr > 24
    assert (decoded - clip).abs().mean() < (decoded[:, :, :1] - clip).abs().mean() / 2, (
        "the decoded clip must move like the clip"
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare within 1e-6 in the norm, and within some roundings in the worst pixel."""
    assert (actual - expected).norm() < 1e-6 * expected.norm()
    torch.testing.assert_close(actual, expected, atol=4e-6 * expected.abs().max().item(), rtol=0)


@torch.no_grad()
def in_float64(x: Tensor, way: str) -> Tensor:
    vae = load_components("tiny").vae
    vae.model.double()
    return getattr(vae.model, way)(x.double(), [part.double() for part in vae.scale])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_fast_convolution_changes_nothing(batch: int) -> None:
    vae, fast = (load_components("tiny").vae for _ in range(2))
    use_onednn_conv3d(fast)
    assert fast.model.encoder.conv1._conv_forward.__func__ is not vae.model.encoder.conv1._conv_forward.__func__
    video = random_video(5, batch)
    with torch.no_grad():
        expected, actual = (v.model.encode(video, v.scale) for v in (vae, fast))
    exact = in_float64(video, "encode")
    # On some CPUs, the error of torch's own convolution is larger than 1e-6.
    assert (actual - exact).norm() < max(1e-6 * exact.norm(), 1.25 * (expected - exact).norm())

    values, gradients = [], []
    for one in (vae, fast):
        latents = expected.clone().requires_grad_()
        decoded = one.model.decode(latents, one.scale)
        (decoded * video).sum().backward()
        assert latents.grad is not None
        values.append(decoded.detach())
        gradients.append(latents.grad.double().flatten())
    exact = in_float64(expected, "decode")
    assert (values[1] - exact).norm() < max(1e-6 * exact.norm(), 1.25 * (values[0] - exact).norm())
    assert 1 - F.cosine_similarity(gradients[0], gradients[1], dim=0) < 1e-6
    assert (gradients[1].norm() / gradients[0].norm() - 1).abs() < 1e-6


def test_the_fast_convolution_steps_aside_for_other_types() -> None:
    """Use torch's own convolution for bf16 weights and autocast, bit for bit."""
    vae, fast = (load_components("tiny").vae for _ in range(2))
    use_onednn_conv3d(fast)
    video = random_video(5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = (v.model.encode(video, v.scale) for v in (vae, fast))
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    vae.bfloat16(), fast.bfloat16()
    with torch.no_grad():
        expected, actual = (v.model.encode(video.bfloat16(), v.scale) for v in (vae, fast))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["vae", "vae38"])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_decoding_all_frames_at_once_changes_nothing_and_keeps_less(
    name: str, frames: int, request: pytest.FixtureRequest
) -> None:
    decoder: Any = request.getfixturevalue(name)
    expected, gradient, kept = decoded_with_gradient(decoder, frames, diffsynths(decoder))
    video, at_once, less = decoded_with_gradient(decoder, frames, lambda z: decode_latents(decoder, z))
    assert (video - expected).norm() < 2e-6 * expected.norm()
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=0)
    assert 1 - F.cosine_similarity(at_once.double().flatten(), gradient.double().flatten(), dim=0) < 1e-10
    assert (at_once - gradient).norm() < 5e-6 * gradient.norm()
    assert less < 0.5 * kept


@torch.no_grad()
@pytest.mark.parametrize("name", ["vae", "vae38"])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_chunk_after_another_is_the_clip(name: str, frames: int, request: pytest.FixtureRequest) -> None:
    """Also compare the caches with those of the networks from which engines of the decoder are built."""
    decoder: Any = request.getfixturevalue(name)
    latents = torch.randn(2, len(decoder.scale[0]), frames, 4, 6, generator=torch.Generator().manual_seed(frames))
    expected = diffsynths(decoder)(latents)
    torch.testing.assert_close(decode_latents(decoder, latents), expected, atol=1e-5, rtol=0)
    first, following = VaeDecoderFirst(decoder), VaeDecoderNext(decoder)
    caches: list[Tensor] = []
    for chunk in latents.split(1, dim=2):
        wanted = following(chunk, *caches) if caches else first(chunk)
        video, *caches = decode_chunk(decoder, chunk, caches)
        assert [cache.shape for cache in caches] == [cache.shape for cache in wanted[1:]]
        for one, other in zip((video.clamp(-1, 1), *caches), wanted, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()


def test_all_frames_at_once_under_autocast(vae: Any) -> None:
    """Be as close to the exact video and gradient as diffsynth's own decoder under autocast."""
    exact, exact_gradient, _ = decoded_with_gradient(vae, 3, diffsynths(vae))
    with torch.autocast("cpu", torch.bfloat16):
        plain, plain_gradient, _ = decoded_with_gradient(vae, 3, diffsynths(vae))
        video, gradient, _ = decoded_with_gradient(vae, 3, lambda z: decode_latents(vae, z))
    assert video.dtype == plain.dtype == torch.bfloat16
    assert (video - exact).norm() < 1.1 * (plain - exact).norm()
    assert (gradient - exact_gradient).norm() < 1.1 * (plain_gradient - exact_gradient).norm()
