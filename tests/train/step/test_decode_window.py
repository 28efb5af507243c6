"""A window of the clip is decoded like in the whole clip, and the frames after it are not decoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffsynth.models.wan_video_vae import WanVideoVAE38, unpatchify
from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.tiny.clips import held_out_clips
from frostline.train import WanTrainingModule
from frostline.train.step.decoding import decode_live
from frostline.train.step_settings import TrainingModuleSettings

MakeModule = Callable[..., WanTrainingModule]
BRIGHTNESS = {"type": "own_rewards:Brightness", "weight": 1.0, "scale": 1.0}


def random_latents(channels: int) -> Tensor:
    return torch.randn(2, channels, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def detached_caches(module: WanTrainingModule, latents: Tensor, window: slice) -> Tensor:
    """Run diffsynth's loop, and detach the caches before the first latent frame of the window."""
    vae, first = module.components.vae, window.start
    model = vae.model
    model.clear_cache()
    mean, scale = (part.view(1, -1, 1, 1, 1) for part in vae.scale)
    x = model.conv2(latents / scale + mean)
    frames = []
    for index in range(window.stop):
        if index == first:
            model._feat_map = [cache.detach() if isinstance(cache, Tensor) else cache for cache in model._feat_map]
        model._conv_idx = [0]
        # Wan2.2's own decoder needs to know which frame is the first, and returns pixels in patches.
        how = {"first_chunk": index == 0} if isinstance(vae, WanVideoVAE38) else {}
        out, model._feat_map, model._conv_idx = model.decoder(
            x[:, :, index : index + 1], feat_cache=model._feat_map, feat_idx=model._conv_idx, **how
        )
        frames.append(unpatchify(out, patch_size=2) if how else out)
    model.clear_cache()
    return ((torch.cat(frames[first:], dim=2).clamp(-1, 1) + 1) / 2).transpose(1, 2)


@pytest.mark.parametrize("how", ["none", "block", "full"])
@pytest.mark.parametrize("window", [slice(0, 2), slice(1, 2), slice(2, 4)], ids=str)
@pytest.mark.parametrize(("model", "backend"), [("tiny", "torch"), ("tiny", "onnxruntime"), ("tiny-ti2v", "torch")])
def test_frames_and_gradient(
    model: str, backend: str, window: slice, how: Any, make_module: MakeModule, engines: Path
) -> None:
    module = make_module(model, plan={"vae_decoder": backend}, engines=engines)
    decoder, channels = module.model.decoder(), module.model.latent_channels
    with torch.no_grad():
        whole = decode_live(decoder, random_latents(channels), module.runtime, "none", True)
    latents = random_latents(channels).requires_grad_()
    frames = decode_live(decoder, latents, module.runtime, how, True, window)
    first = max(0, 4 * window.start - 3)
    expected = whole[:, first : 4 * window.stop - 3]
    assert frames.shape == expected.shape
    torch.testing.assert_close(frames.detach(), expected, atol=1e-6 if backend == "torch" else 1e-5, rtol=0)
    weights = torch.linspace(-1, 1, frames.numel()).view_as(frames)
    (own,) = torch.autograd.grad((frames * weights).sum(), latents)
    theirs = random_latents(channels).requires_grad_()
    (exact,) = torch.autograd.grad((detached_caches(module, theirs, window) * weights).sum(), theirs)
    assert own[:, :, window.stop :].abs().max() == 0 if window.stop < 4 else True
    assert own[:, :, : window.start].abs().sum() == 0
    torch.testing.assert_close(own, exact, atol=1e-5 * exact.abs().max().item(), rtol=0)


def test_what_comes_after_the_window_is_not_decoded(make_module: MakeModule) -> None:
    module = make_module()
    latents = random_latents(module.model.latent_channels)
    latents[:, :, 2:] = torch.nan
    assert decode_live(module.model.decoder(), latents, module.runtime, "none", True, slice(1, 2)).isfinite().all()


def test_rewards_see_the_first_frame_and_the_window(make_module: MakeModule) -> None:
    clips = held_out_clips(1, seed=4, num_frames=9, size=32)
    data = {"prompt": clips.prompts, "video": clips.video}
    seen: list[Tensor] = []

    def look(module: WanTrainingModule) -> list[Tensor]:
        seen.clear()
        score = module.score

        def watch(frames: Tensor, conditioning: Any, latents: Tensor) -> Any:
            seen.append(frames.detach())
            return score(frames, conditioning, latents)

        module.score = watch  # type: ignore[method-assign]
        module(data)[0].backward()
        return [*seen]

    settings: dict[str, Any] = {"rewards": [BRIGHTNESS], "grad_start_step": 7}
    (whole,) = look(make_module(**settings))
    window = {"num_latent_frames": 1, "position": "last"}
    (last,) = look(make_module(**settings, decode=window))
    assert last.shape == (1, 5, 3, 32, 32)
    torch.testing.assert_close(last[:, 1:], whole[:, 5:], atol=1e-6, rtol=0)
    torch.testing.assert_close(last[:, 0], clips.video[:, 0], atol=1e-6, rtol=0)
    (first,) = look(make_module(**settings, decode={**window, "position": "first", "num_latent_frames": 2}))
    torch.testing.assert_close(first, whole[:, :5], atol=1e-6, rtol=0)


def test_random_windows_cover_the_clip() -> None:
    decode = TrainingModuleSettings.parse({"decode": {"num_latent_frames": 2}}).decode
    torch.manual_seed(0)
    drawn = [decode.draw(5) for _ in range(50)]
    assert {window.start for window in drawn} == {0, 1, 2, 3}
    assert all(window.stop - window.start == 2 for window in drawn)
    assert decode.draw(2) == decode.draw(1).__class__(0, 2)
    assert decode.draw(1) == slice(0, 1)


def test_rewards_of_neighbouring_frames_refuse_a_window() -> None:
    pytest.importorskip("frostline.rewards.motion")
    with pytest.raises(ConfigError, match="compares neighbouring frames"):
        TrainingModuleSettings.parse({"decode": {"num_latent_frames": 2}, "rewards": [{"type": "motion"}]})
