"""Cosines of frames, compared with DINOv2 and a loop over the frames."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.errors import ConfigError
from frostline.rewards.active import ActiveReward
from frostline.rewards.config import RewardConfig, RewardEntry
from frostline.rewards.inputs import RewardInputs
from frostline.runtime.runtime import Runtime

Build = Callable[..., tuple[ActiveReward, Runtime]]


def plain_score(features: Tensor, anchor: Tensor | None) -> Tensor:
    """Return the score of VBench's script, frame by frame; `features` is (T, D) of any length."""
    total = torch.zeros(())
    for t in range(1, len(features)):
        first = features[0] if anchor is None else anchor
        cosines = [F.cosine_similarity(other, features[t], dim=0).clamp(min=0) for other in (first, features[t - 1])]
        total = total + (cosines[0] + cosines[1]) / 2
    return total / (len(features) - 1)


@pytest.mark.parametrize("anchor", ["first_frame", "reference", "pictures"])
def test_value_and_gradient(anchor: str, build_alone: Build, vision_files: dict[str, Any], video: Tensor) -> None:
    active, runtime = build_alone(
        "subject_consistency", anchor="first_frame" if anchor == "first_frame" else "reference"
    )
    model, prepare = vision_files["models"]["subject_consistency"], active.reward.prepare  # type: ignore[attr-defined]
    clips = video.flip(1)
    pictures = torch.rand(3, 3, 30, 44)
    sample = RewardInputs(("a", "b"), clips, (5, 5))
    references = active.references(sample, runtime)
    if anchor == "pictures":
        sample = RewardInputs(("a",), clips[:1], (5,), reference=(pictures,))
        references, video = active.references(sample, runtime), video[:1]
    assert {*references} == ({"anchor"} if anchor != "first_frame" else set())

    def describe(frames: Tensor) -> Tensor:
        return F.normalize(model(pixel_values=prepare(frames)).last_hidden_state[:, 0], dim=1)

    frames, plain = (video.clone().requires_grad_() for _ in range(2))
    scored = active.score(frames, sample, references, runtime)
    expected = []
    for number, clip in enumerate(plain):
        of_reference = pictures if anchor == "pictures" else clips[number]
        mean = None if anchor == "first_frame" else describe(of_reference).mean(dim=0)
        expected.append(plain_score(describe(clip), mean if mean is None else mean.detach()))
    torch.testing.assert_close(scored.score, torch.stack(expected), atol=1e-4, rtol=1e-5)
    assert scored.valid.all()
    scored.score.sum().backward()
    torch.stack(expected).sum().backward()
    assert frames.grad is not None
    assert plain.grad is not None
    assert F.cosine_similarity(frames.grad.flatten(), plain.grad.flatten(), dim=0) >= 0.99999
    with torch.no_grad():
        frozen = active.score(video, sample, references, runtime)
    torch.testing.assert_close(frozen.score, torch.stack(expected).detach(), atol=1e-4, rtol=1e-5)
    assert frozen.frame_scores is not None
    assert frozen.frame_scores.shape == (len(frozen.score), 4)
    torch.testing.assert_close(frozen.frame_scores.mean(dim=1), frozen.score)


def test_opposite_frames_count_as_zero(build_alone: Build) -> None:
    active, _ = build_alone("subject_consistency")
    reward: Any = active.reward
    up = F.normalize(torch.randn(1, 1, 32), dim=2)
    assert reward.pool(torch.cat([up, -up], dim=1), {}).score.item() == 0
    assert reward.pool(torch.cat([up, up, up], dim=1), {}).score.item() == pytest.approx(1)


def test_a_single_frame_cannot_be_scored(build_alone: Build, video: Tensor) -> None:
    active, runtime = build_alone("subject_consistency")
    frames = video[:, :1].clone().requires_grad_()
    scored = active.score(frames, RewardInputs(("a", "b"), video, (5, 5)), {}, runtime)
    assert not scored.valid.any()
    scored.score.sum().backward()
    assert frames.grad is not None
    assert frames.grad.abs().max() == 0
    assert active.reward.unscored == "a single frame"


def test_what_it_needs_is_as_its_settings_say() -> None:
    configs = [
        RewardEntry.parse({"type": "subject_consistency", "anchor": name}) for name in ("first_frame", "reference")
    ]
    needs = [config.needs for config in configs if isinstance(config, RewardConfig)]
    assert needs == [frozenset(), frozenset({"reference"})]
    with pytest.raises(ConfigError, match="compares neighbouring frames"):
        RewardEntry.parse({"type": "subject_consistency", "frames": "every:2"})
    with pytest.raises(ConfigError, match="the reward subject_consistency needs weights: download a DINOv2 model"):
        configs[0].build()  # type: ignore[attr-defined]
