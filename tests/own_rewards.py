"""A user's rewards, which settings name as `own_rewards:Brightness`, `own_rewards:Likeness` and so on."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from frostline.models.video_shape import VideoShape
from frostline.rewards.active import RewardStages
from frostline.rewards.config import RewardConfig
from frostline.rewards.frame_reward import FrameReward
from frostline.rewards.inputs import Need, RewardInputs
from frostline.rewards.reward import LiveNetwork, Reward, RewardScore
from frostline.runtime.stage import Network, Stage, TensorSpec
from frostline.stages.provider import Use
from frostline.stages.shapes import ShapeRange
from frostline.stages.tolerances import tolerance


class BrightnessConfig(RewardConfig):
    """Settings with another default for a setting that all rewards have."""

    scale: float = Field(default=4.0, gt=0, description="standard deviation used to normalise the score")
    offset: float = Field(default=0.0, description="added to the mean")
    darkest: float = Field(
        default=0.0, description="minimum mean of the reference; a video with a darker one is not scored"
    )


class Brightness(Reward):
    Config = BrightnessConfig
    name = "brightness"

    def __init__(self, config: BrightnessConfig) -> None:
        if config.offset > 1:
            raise ValueError("an offset above 1")
        self.config = config

    def references(self, sample: RewardInputs, run: RewardStages) -> dict[str, Tensor]:
        return {"brightness": sample.video.flatten(1).mean(dim=1)}

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        mean = frames.flatten(1).mean(dim=1) + self.config.offset
        return RewardScore(mean, references["brightness"] >= self.config.darkest)


class Features(nn.Module):
    """A network from frames (N, 3, H, W) to features (N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Dropout(0.5), nn.Tanh(), nn.Conv2d(8, 8, 3, 2))

    def forward(self, frames: Tensor) -> Tensor:
        return self.layers(frames).mean(dim=(2, 3))


class LikenessConfig(RewardConfig):
    """Settings of a reward with one stage, frozen for the references and live for the generated frames."""

    uses: ClassVar[tuple[Use, ...]] = (
        Use("features", live=False, count=1, phase="conditioning"),
        Use("features", live=True, count=1, phase="reward"),
    )
    seed: int = Field(description="seed of the random weights")


class Likeness(Reward):
    """Compare the features of generated frames with those of the reference; also count the words of the prompt."""

    Config = LikenessConfig
    name = "likeness"

    def __init__(self, config: LikenessConfig) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.features = Features()

    def stages(self, shapes: ShapeRange) -> Sequence[Stage]:
        sides = (shapes.dimension("face_height"), shapes.dimension("face_width"))
        frames = TensorSpec("frames", (shapes.dimension("faces"), 3, *sides))
        network = Network("features", self.features, (frames,), ("features",))
        return [
            Stage(name="features", model="likeness", networks=(network,), tolerance=tolerance(network.weight.dtype))
        ]

    def live_networks(self, shape: VideoShape) -> Sequence[LiveNetwork]:
        frame = torch.zeros(1, 3, shape.height, shape.width)
        return [LiveNetwork("features", self.features, (frame,), shape.batch_size * shape.num_frames)]

    def references(self, sample: RewardInputs, run: RewardStages) -> dict[str, Tensor]:
        B, T = sample.video.shape[:2]
        features = run["features"](frames=sample.video.flatten(0, 1))["features"]
        words = [len(prompt.split()) for prompt in sample.prompts]
        return {"features": features.unflatten(0, (B, T)).mean(dim=1), "words": torch.tensor(words)}

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        B, T = frames.shape[:2]
        with run.live("features"):
            features = self.features(frames.flatten(0, 1)).unflatten(0, (B, T)).mean(dim=1)
        score = -(features - references["features"]).square().sum(dim=1)
        return RewardScore(score, torch.ones(B, dtype=torch.bool), {"words": references["words"].float()})


class Undeclared(Likeness):
    """A reward with a stage that its settings do not name."""

    Config = RewardConfig  # type: ignore[assignment]

    def __init__(self, config: RewardConfig) -> None:
        self.features = Features()


class Curious(Brightness):
    """A reward that requests a stage of the model."""

    def references(self, sample: RewardInputs, run: RewardStages) -> dict[str, Tensor]:
        return run["vae_encoder"](video=sample.video)


class Unsaid(Brightness):
    """A reward that stores nothing of the references."""

    def references(self, sample: RewardInputs, run: RewardStages) -> dict[str, Tensor]:
        return {}

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        """Compare with the valid frames of the video itself."""
        B = len(frames)
        own = [video[:count].mean() for video, count in zip(sample.video, sample.valid_frames, strict=True)]
        return RewardScore(
            frames.flatten(1).mean(dim=1) - torch.stack(own), torch.tensor([True] * B), {"length": torch.zeros(B)}
        )


class OfAllTogether(Brightness):
    """A reward that returns one score for all videos."""

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        return RewardScore(frames.mean(), torch.ones(len(frames), dtype=torch.bool))


class NoConfig:
    name = "none"


class NoReward:
    Config = RewardConfig
    name = "none"

    def __init__(self, config: RewardConfig) -> None:
        pass


class Restless(Brightness):
    """A reward that draws random numbers while it scores."""

    name = "restless"

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        return RewardScore(torch.rand(len(frames)), torch.ones(len(frames), dtype=torch.bool))


class ChangeConfig(RewardConfig):
    """Settings of a reward that compares neighbouring frames."""

    needs_neighbours: ClassVar[bool] = True
    still: float = Field(default=0.0, description="a video is scored if its change is larger")


class Change(FrameReward):
    """How much frames change relative to the reference; a reward of each frame and the one before it."""

    Config = ChangeConfig
    name = "change"
    unscored = "nothing moves"
    window = 2

    def __init__(self, config: ChangeConfig) -> None:
        self.still = config.still

    def features(self, frames: Tensor, run: RewardStages) -> Tensor:
        return (frames[:, 1:] - frames[:, :-1]).abs().flatten(2).mean(dim=2, keepdim=True)

    def reference(self, features: Tensor | None, prompts: Sequence[str], run: RewardStages) -> dict[str, Tensor]:
        assert features is not None
        return {"change": features.mean(dim=(1, 2))}

    def pool(self, features: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        change = features.mean(dim=(1, 2))
        ratio = change / references["change"]
        return RewardScore(
            ratio.log(), change > self.still, {"ratio": ratio, "rows": torch.tensor([features.shape[1]])}
        )


class LengthConfig(RewardConfig):
    """Settings of a reward that needs nothing except the video."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    fails_at: int = Field(default=0, description="number of frames for which scoring raises an error")


class Length(Reward):
    """A reward of whole clips: the number of frames."""

    Config = LengthConfig
    name = "length"

    def __init__(self, config: LengthConfig) -> None:
        self.fails_at = config.fails_at

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        if frames.shape[1] == self.fails_at:
            raise ValueError(f"{self.fails_at} frames")
        length = torch.tensor([float(frames.shape[1])])
        return RewardScore(torch.where(length > 1, length, torch.nan), torch.tensor([True]))
