"""Rewards of single frames: training and streaming pool the same features."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from frostline.rewards.active import ActiveReward, RewardStages
from frostline.rewards.config import RewardConfig
from frostline.rewards.frame_reward import FrameReward
from frostline.rewards.inputs import RewardInputs
from frostline.rewards.reward import RewardScore
from frostline.runtime.runtime import Runtime

RUN = RewardStages(Runtime({}), ())


class MeanConfig(RewardConfig):
    pass


class FrameMean(FrameReward):
    """The difference between the means of frames and reference; it records how the features were computed."""

    Config = MeanConfig
    name = "mean"
    ways: list[str]

    def __init__(self) -> None:
        self.ways = []

    def features(self, frames: Tensor, run: RewardStages) -> Tensor:
        self.ways.append("frozen")
        return self._means(frames)

    def live_features(self, frames: Tensor, run: RewardStages) -> Tensor:
        self.ways.append("live")
        return self._means(frames)

    def reference(self, features: Tensor | None, prompts: Sequence[str], run: RewardStages) -> Mapping[str, Tensor]:
        assert features is not None
        return {"mean": features.mean(dim=(1, 2))}

    def pool(self, features: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        score = -(features.mean(dim=(1, 2)) - references["mean"]).abs()
        return RewardScore(score, torch.ones_like(score, dtype=torch.bool))

    @staticmethod
    def _means(frames: Tensor) -> Tensor:
        return frames.flatten(2).mean(dim=2)[..., None]


class Ungiven(FrameMean):
    uses_start: ClassVar[bool] = True


def sample(video: Tensor, *reference: Tensor | None) -> RewardInputs:
    return RewardInputs(("",) * len(video), video, (video.shape[1],) * len(video), reference)


def test_the_first_frame_counts_only_where_the_reward_says_so() -> None:
    video = torch.zeros(2, 3, 3, 4, 4)
    video[:, 0] = 0.9
    assert FrameMean().references(sample(video), RUN)["mean"].tolist() == [0, 0]
    assert Ungiven().references(sample(video), RUN)["mean"].tolist() == pytest.approx([0.3, 0.3])


def test_pictures_of_the_subject_take_the_place_of_the_clip() -> None:
    pictures = torch.full((2, 3, 8, 8), 0.25)
    pictures[1] = 0.75
    references = FrameMean().references(sample(torch.zeros(1, 5, 3, 4, 4), pictures), RUN)
    assert references["mean"].tolist() == [0.5], "all pictures must count, also the first one"


def test_features_are_live_only_where_a_gradient_is_wanted() -> None:
    reward, video = FrameMean(), torch.rand(1, 3, 3, 4, 4)
    inputs = sample(video)
    references = reward.references(inputs, RUN)
    frames = video.clone().requires_grad_()
    trained = reward.score(frames, inputs, references, RUN)
    with torch.no_grad():
        validated = reward.score(frames, inputs, references, RUN)
    assert reward.ways == ["frozen", "live", "frozen"]
    assert trained.score.item() == validated.score.item()


def test_the_selection_of_frames_is_the_settings() -> None:
    video = torch.zeros(1, 5, 3, 4, 4)
    video[:, 4] = 1
    active = ActiveReward(FrameMean(), MeanConfig(type="x:Y", frames="last"), (), "")
    inputs = sample(torch.zeros_like(video))
    scored = active.score(video, inputs, active.references(inputs, Runtime({})), Runtime({}))
    assert scored.score.item() == -1


def test_rows_keep_all_that_is_told_of_a_sample() -> None:
    picture = torch.zeros(1, 3, 4, 4)
    inputs = RewardInputs(
        ("a", "b"), torch.rand(2, 5, 3, 4, 4), (5, 3), (None, picture), (8.0, None), torch.rand(2, 16, 2, 1, 1)
    )
    row = inputs.row(1)
    assert (row.prompts, row.valid_frames, row.reference, row.fps) == (("b",), (3,), (picture,), (None,))
    assert row.video.equal(inputs.video[1:, :3])
    assert row.latents is not None
    assert inputs.latents is not None
    assert row.latents.equal(inputs.latents[1:])
