"""Inputs of rewards: the sample's own pictures, its frame rate, generated latents; unused inputs are not computed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from steps import QUICK, gradient, small_clips
from tiny_t2v import write_tiny_t2v
from torch import Tensor

from frostline.errors import ConfigError, DataError
from frostline.rewards.active import RewardStages
from frostline.rewards.config import RewardConfig
from frostline.rewards.inputs import RewardInputs
from frostline.rewards.reward import Reward, RewardScore
from frostline.train import WanTrainingModule
from frostline.train.loop.evaluation import evaluate

MakeModule = Callable[..., WanTrainingModule]
SHARPNESS = {"type": "sharpness", "weight": 1.0}
SEEN: list[RewardInputs] = []


class NeedsLatents(RewardConfig):
    needs: ClassVar[frozenset[Any]] = frozenset({"latents"})


class Energy(Reward):
    """The mean square of the generated latents, a reward without a reference."""

    Config = NeedsLatents
    name = "energy"

    def __init__(self, config: RewardConfig) -> None:
        pass

    def references(self, sample: RewardInputs, run: RewardStages) -> dict[str, Tensor]:
        raise AssertionError("references that nobody needs are computed")

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        SEEN.append(sample)
        assert sample.latents is not None and references == {}
        energy = sample.latents.square().flatten(1).mean(dim=1)
        return RewardScore(energy, torch.ones_like(energy, dtype=torch.bool), {"own_fps": torch.tensor(sample.fps)})


ENERGY = {"type": "test_sample_inputs:Energy", "weight": 1.0}


def pictures(count: int, seed: int = 0, size: int = 40) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def laplacian(frames: Tensor) -> float:
    """Compute the mean squared Laplacian of the luminance of (R, 3, h, w) frames."""
    luma = 0.299 * frames[:, 0] + 0.587 * frames[:, 1] + 0.114 * frames[:, 2]
    inner = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return (around - 4 * inner).square().mean().item()


def change(frames: Tensor) -> float:
    """Compute the mean absolute change of the luminance of (T, 3, h, w) frames."""
    luma = 0.299 * frames[:, 0] + 0.587 * frames[:, 1] + 0.114 * frames[:, 2]
    return (luma[1:] - luma[:-1]).abs().mean().item()


@pytest.fixture(scope="module")
def module(make_module: MakeModule) -> WanTrainingModule:
    return make_module(rewards=[SHARPNESS], **QUICK)


@pytest.fixture(scope="module")
def text_to_video(make_module: MakeModule, tmp_path_factory: pytest.TempPathFactory) -> WanTrainingModule:
    folder = write_tiny_t2v(tmp_path_factory.mktemp("t2v") / "model")
    return make_module(str(folder), rewards=[SHARPNESS], **QUICK)


def test_pictures_of_its_own_are_the_reference(module: WanTrainingModule) -> None:
    """Use all pictures of each sample, whatever the other samples of the batch have; check features and the cache."""
    data = small_clips(3)
    one, other = pictures(2), pictures(3, seed=1, size=24)
    (kept,) = module.forward_preprocess({**data, "reference": [one, None, other]}).references
    expected = [laplacian(one), laplacian(data["video"][1, 1:]), laplacian(other)]
    torch.testing.assert_close(kept["sharpness"], torch.tensor(expected) + 1e-6, rtol=1e-4, atol=0)
    for row, own in enumerate((one, None, other)):
        alone = {"prompt": [data["prompt"][row]], "video": data["video"][row : row + 1], "reference": [own]}
        (again,) = module.forward_preprocess(alone).references
        assert torch.equal(again["sharpness"][0], kept["sharpness"][row])


def test_other_pictures_are_other_references_and_the_conditions_stay(make_module: MakeModule) -> None:
    module, data = make_module(rewards=[SHARPNESS], **QUICK), small_clips(1)
    cache = module.parts.cache
    assert cache is not None
    found = []
    for own, misses in ((None, 3), (pictures(1), 1), (pictures(1, seed=1), 1), (pictures(1), 0), (None, 0)):
        before = cache.misses
        (kept,) = module.forward_preprocess({**data, "reference": [own]}).references
        found.append(kept["sharpness"].item())
        assert cache.misses - before == misses, "context, y and the references of one sample"
    assert len({*found}) == 3
    assert found[1] == found[3] and found[0] == found[4]


def test_a_reward_that_keeps_every_picture_wants_equally_many(make_module: MakeModule) -> None:
    module = make_module(rewards=[{"type": "test_padding:EveryFrame"}], **QUICK)
    with pytest.raises(ConfigError, match=r"every_frame stores data of each frame.*the column reference"):
        module.forward_preprocess({**small_clips(2), "valid_frames": [3, 5], "reference": [None, pictures(2)]})


def test_latents_and_rates_are_told_with_gradient(make_module: MakeModule) -> None:
    """Compute the gradient of the LoRA through the latents only, not through the frames."""
    SEEN.clear()
    module = make_module(rewards=[ENERGY], kl_weight=0.0, cache_bytes=0, **QUICK)
    data = {**small_clips(2), "fps": [16.0, 24.0]}
    loss, score, _ = module(data)
    (sample,) = SEEN
    assert sample.latents is not None and sample.latents.shape == (2, 16, 2, 4, 4) and sample.fps == (16.0, 24.0)
    torch.testing.assert_close(score, sample.latents.detach().square().mean())
    torch.testing.assert_close(loss.detach(), -score)
    loss.backward()
    through_latents = gradient(module)
    assert through_latents.isfinite().all() and through_latents.norm() > 0
    assert module.last_metrics is not None and module.last_metrics.per_sample["own_fps"] == [16.0, 24.0]
    # Compare with finite differences along the gradient.
    step, parameters = 1e-3 / through_latents.norm().item(), [*module.trainable_parameters().values()]
    losses = []
    for sign in (1, -2):
        offset = 0
        with torch.no_grad():
            for parameter in parameters:
                own = through_latents[offset : offset + parameter.numel()].view_as(parameter)
                parameter += (sign * step * own).to(parameter.dtype)
                offset += parameter.numel()
            losses.append(module(data)[0].item())
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(through_latents.square().sum().item(), rel=0.05)


def test_validation_tells_the_latents_of_what_it_generates(make_module: MakeModule) -> None:
    SEEN.clear()
    module, clips = make_module(rewards=[ENERGY], cache_bytes=0, **QUICK), small_clips(2)
    samples: Any = [
        {"sample_id": str(row), "prompt": clips["prompt"][row], "video": clips["video"][row], "fps": 8.0}
        for row in range(2)
    ]
    evaluation = evaluate(module, samples, [0, 1], batch_size=2)
    (sample,) = SEEN
    assert sample.latents is not None and sample.fps == (8.0, 8.0)
    torch.testing.assert_close(module.decode(sample.latents).cpu(), evaluation.videos)
    torch.testing.assert_close(evaluation.measured["energy"], sample.latents.square().flatten(1).mean(dim=1))


def test_a_sample_without_a_video(text_to_video: WanTrainingModule) -> None:
    """Generate and score it like a sample whose video is not used."""
    own, clips = pictures(2), small_clips(1)
    black = torch.zeros_like(clips["video"])
    data = {"prompt": clips["prompt"], "video": black, "valid_frames": [0], "reference": [own]}
    conditioning = text_to_video.forward_preprocess(data)
    assert tuple(conditioning.conditions) == ("context",)
    assert conditioning.sample.valid_frames == (0,) and conditioning.latent_shape == (16, 2, 4, 4)
    loss, *_ = text_to_video(data)
    with_clip, *_ = text_to_video({**data, "video": clips["video"], "valid_frames": [5]})
    assert loss.item() == with_clip.item()
    loss.backward()
    assert gradient(text_to_video).norm() > 0


def test_a_sample_without_a_video_is_refused_where_one_is_needed(
    module: WanTrainingModule, text_to_video: WanTrainingModule
) -> None:
    data = {**small_clips(2), "valid_frames": [5, 0], "sample_id": ["a", "b"]}
    with pytest.raises(DataError, match=r"sample b, field 'video': .* the reward sharpness needs a reference$"):
        text_to_video(data)
    with pytest.raises(DataError, match=r"sample b, field 'video': .* the model tiny needs a first frame$"):
        module({**data, "reference": [None, pictures(1)]})


def test_of_no_video_there_is_no_psnr(text_to_video: WanTrainingModule, tmp_path: Path) -> None:
    black = torch.zeros(5, 3, 32, 32)
    samples: Any = [
        {"sample_id": "a", "prompt": "p", "video": black, "valid_frames": 0, "reference": pictures(1)},
        {"sample_id": "b", "prompt": "p", "video": black},
    ]
    measured = evaluate(text_to_video, samples, [0, 1], batch_size=2).measured
    assert measured["psnr"].isnan().tolist() == [True, False]
    assert measured["sharpness"].isfinite().all()
    # Neither sample has a clip with motion.
    assert measured["motion_ratio"].isnan().all()


def test_sharpness_and_motion_are_measured_whatever_is_rewarded(make_module: MakeModule) -> None:
    """Compare with the ratios computed here, if neither is a reward or a judge; rewards are not computed twice."""
    settings: dict[str, Any] = {"rewards": [{"type": "own_rewards:Brightness", "weight": 1.0}], **QUICK}
    module, clips = make_module(**settings), small_clips(2)
    samples: Any = [
        {"sample_id": str(row), "prompt": clips["prompt"][row], "video": clips["video"][row], "reference": pictures(1)}
        for row in range(2)
    ]
    evaluation = evaluate(module, samples, [0, 1], batch_size=2)
    assert (evaluation.judges, len(evaluation.rewards)) == ((), 1)
    for row in range(2):
        made, true = evaluation.videos[row], clips["video"][row]
        sharp = (laplacian(made[1:]) + 1e-6) / (laplacian(true[1:]) + 1e-6)
        assert evaluation.measured["sharpness_ratio"][row].item() == pytest.approx(sharp, rel=1e-3)
        moves = [(change(video) + 1e-4) for video in (made, true)]
        assert evaluation.measured["motion_ratio"][row].item() == pytest.approx(moves[0] / moves[1], rel=1e-3)
    assert {"sharpness_ratio", "motion_ratio"} <= evaluation.settings.keys()
    both = make_module(rewards=[SHARPNESS, {"type": "motion"}], **QUICK)
    names = [name for name in evaluate(both, samples, [0], batch_size=1).measured if "ratio" in name]
    assert names == ["sharpness_ratio", "motion_ratio"]
