"""Aesthetic ratings of frames, compared with CLIP and the predictor."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.errors import ConfigError
from frostline.rewards.active import ActiveReward
from frostline.rewards.inputs import RewardInputs
from frostline.runtime.runtime import Runtime

Build = Callable[..., tuple[ActiveReward, Runtime]]


def test_value_and_gradient(build_alone: Build, vision_files: dict[str, Any], video: Tensor) -> None:
    active, runtime = build_alone("aesthetic")
    clip, predictor = (vision_files["models"][name] for name in ("clip", "aesthetic"))
    sample = RewardInputs(("a", "b"), video, (5, 5))
    references = active.references(sample, runtime)
    assert references == {}, "the reward needs neither prompts nor references"
    frames = video.clone().requires_grad_()
    scored = active.score(frames, sample, references, runtime)
    scored.score.sum().backward()
    plain = video.clone().requires_grad_()
    prepared = active.reward.prepare(plain[:, 1:].flatten(0, 1))  # type: ignore[attr-defined]
    embeddings = clip.get_image_features(pixel_values=prepared).pooler_output
    embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
    expected = predictor(embeddings)[:, 0].unflatten(0, (2, 4)).mean(dim=1)
    expected.sum().backward()
    torch.testing.assert_close(scored.score, expected, atol=1e-4, rtol=1e-5)
    assert scored.valid.all()
    assert expected[0] != expected[1]
    assert frames.grad is not None
    assert plain.grad is not None
    assert F.cosine_similarity(frames.grad.flatten(), plain.grad.flatten(), dim=0) >= 0.99999
    with torch.no_grad():
        frozen = active.score(video, sample, references, runtime)
    torch.testing.assert_close(frozen.score, expected, atol=1e-4, rtol=1e-5)
    assert frozen.frame_scores is not None
    assert frozen.frame_scores.shape == (2, 4)
    torch.testing.assert_close(frozen.frame_scores.mean(dim=1), frozen.score)


def test_the_predictor_stays_exact_where_the_tower_does_not(build_alone: Build, video: Tensor) -> None:
    active, _ = build_alone("aesthetic", precision="bf16")
    reward: Any = active.reward
    assert {p.dtype for p in reward.predictor.parameters()} == {torch.float32}
    assert {p.dtype for p in reward.image.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": None}, "the reward aesthetic needs weights: download openai/clip-vit-large-patch14"),
        ({"predictor": None}, "the reward aesthetic needs predictor: download sac+logos+ava1-l14-linearMSE.pth"),
        ({"predictor": "gone.pth"}, "gone.pth: no such file or folder; download sac+logos"),
    ],
)
def test_what_is_missing_is_told(settings: dict[str, Any], message: str, build_alone: Build) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_alone("aesthetic", **settings)
