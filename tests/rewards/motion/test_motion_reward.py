"""Motion: the amount of the reference is best; by luminance, and by RAFT in PyTorch and on engines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from raft_file import raft_file
from torch import Tensor
from torchvision.models.optical_flow import RAFT

from frostline.errors import ConfigError
from frostline.export.exporter import export_stage
from frostline.export.tracing.trace_cache import Traces
from frostline.models.video_shape import VideoShape
from frostline.rewards.active import RewardStages
from frostline.rewards.config import RewardEntry, stage_names
from frostline.rewards.inputs import RewardInputs
from frostline.rewards.motion import Config
from frostline.rewards.motion import reward as motion
from frostline.rewards.motion.reward import MotionReward
from frostline.rewards.reward import RewardScore
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.runtime import Runtime
from frostline.stages.shapes import ShapeRange

UPDATES = 2
RUN = RewardStages(Runtime({}), ())


def moving(pixels: int, frames: int = 4, size: int = 64) -> Tensor:
    """Return (1, frames, 3, size, size) in [0, 1]: smooth waves that move by this number of pixels per frame."""
    place = torch.arange(size) * (2 * torch.pi / size)
    steps = torch.arange(frames) * (pixels * 2 * torch.pi / size)
    waves = 0.5 + 0.2 * (2 * (place - steps[:, None])).sin()[:, None, :] + 0.1 * (3 * place).cos()[None, :, None]
    return waves[None, :, None].expand(1, -1, 3, -1, -1) * torch.tensor([1.0, 0.8, 0.6])[:, None, None]


def sample(video: Tensor, *reference: Tensor | None) -> RewardInputs:
    return RewardInputs(("",) * len(video), video, (video.shape[1],) * len(video), reference)


def scored(reward: MotionReward, generated: Tensor, reference: Tensor, run: RewardStages = RUN) -> RewardScore:
    inputs = sample(reference)
    with torch.no_grad():
        references = reward.references(inputs, run)
    return reward.score(generated, inputs, references, run)


def test_the_reference_itself_is_best_and_slower_costs_as_much_as_faster() -> None:
    reward = MotionReward(Config(floor=1e-9))
    reference = moving(2)
    scores = {speed: scored(reward, moving(speed), reference).score.item() for speed in (1, 2, 3)}
    assert scores[2] == 0
    assert scores[1] < -0.2
    assert scores[3] < -0.05
    still = reference[:, :1].expand_as(reference)
    assert scored(reward, still, reference).score < -100
    # Half of the change, and twice the change.
    half, twice = (0.5 + (reference - 0.5) * contrast for contrast in (0.5, 2.0))
    results = [scored(reward, video, reference) for video in (half, twice)]
    torch.testing.assert_close(results[0].score, results[1].score, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1].score, -torch.tensor([2.0]).log().square(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1].metrics["motion_ratio"], torch.tensor([2.0]), atol=1e-5, rtol=1e-5)


def test_change_of_luminance_by_hand() -> None:
    frames = torch.rand(2, 3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    features = MotionReward(Config()).features(frames, RUN)
    luma = 0.299 * frames[:, :, 0] + 0.587 * frames[:, :, 1] + 0.114 * frames[:, :, 2]
    expected = (luma[:, 1:] - luma[:, :-1]).abs().flatten(2).mean(dim=2)
    torch.testing.assert_close(features, expected[..., None].expand(2, 2, 2))


def test_gradient_of_pixels_is_the_slope() -> None:
    """Change the contrast by place: no difference of a pixel changes its sign, so the score has a derivative."""
    generator = torch.Generator().manual_seed(0)
    reward, reference = MotionReward(Config()), moving(2)
    frames = torch.rand(reference.shape, generator=generator).requires_grad_()
    along = torch.rand(64, 64, generator=generator) * (frames.detach() - 0.5)
    scored(reward, frames, reference).score.sum().backward()
    assert frames.grad is not None
    with torch.no_grad():
        ends = [scored(reward, frames + step * along, reference).score.double().sum() for step in (1e-2, -1e-2)]
    slope = (ends[0] - ends[1]) / 2e-2
    assert slope.abs() > 0.1
    torch.testing.assert_close((frames.grad * along).double().sum(), slope, rtol=1e-2, atol=0)


def test_a_reference_that_stands_still_cannot_be_scored() -> None:
    reward = MotionReward(Config())
    picture = moving(2)[:, :1]
    both = torch.cat([picture.expand(1, 4, -1, -1, -1), moving(2)])
    frames = torch.cat([moving(3)] * 2).requires_grad_()
    result = scored(reward, frames, both)
    assert result.valid.tolist() == [False, True]
    assert result.score[0] == 0
    result.score.sum().backward()
    assert frames.grad is not None
    assert frames.grad[0].eq(0).all() and frames.grad[1].ne(0).any()
    # The same applies to a single frame.
    assert scored(reward, moving(3), picture).valid.tolist() == [False]


def test_pictures_of_the_subject_are_no_reference_of_motion() -> None:
    reward, video = MotionReward(Config()), moving(2)
    pictures = torch.rand(2, 3, 20, 20)
    expected = reward.references(sample(video), RUN)
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in reward.references(sample(video, pictures), RUN).items()
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": "every:2"}, "compares neighbouring frames: it only supports all, not 'every:2'"),
        ({"frames": "last"}, "it only supports all"),
        (
            {"flow": "raft"},
            r"flow: raft needs weights: download https://\S+raft_small_C_T_V2\S+, and set weights to its path",
        ),
        ({"weights": "raft.pth"}, "flow: pixels does not use weights"),
        ({"flow": "farneback"}, "pixels"),
        ({"flow": "raft", "weights": "raft.pth", "size": 64}, "128"),
        ({"floor": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardEntry.parse({"type": "motion", **values})


def test_the_stage_is_there_where_it_is_needed() -> None:
    pixels, raft = (
        RewardEntry.parse({"type": "motion", **values}) for values in ({}, {"flow": "raft", "weights": "raft.pth"})
    )
    assert stage_names([pixels]) == ()
    assert stage_names([raft]) == ("motion_flow",)
    assert MotionReward(Config()).live_networks(VideoShape(1, 5, 64, 64)) == ()
    with pytest.raises(ConfigError, match=r"cannot read weights from raft\.pth"):
        MotionReward(Config(flow="raft", weights=Path("raft.pth")))


@pytest.fixture(scope="module")
def raft(tmp_path_factory: pytest.TempPathFactory) -> tuple[RAFT, MotionReward]:
    """Return torchvision's own network, and the reward with its weights."""
    path = tmp_path_factory.mktemp("raft") / "raft.pth"
    network = raft_file(path)
    return network, MotionReward(Config(flow="raft", weights=path, updates=UPDATES))


def served(reward: MotionReward, backend: str = "torch", engines: Path | None = None) -> RewardStages:
    (stage,) = reward.stages(ShapeRange())
    return RewardStages(Runtime({stage.name: stage}, backend, engines, strict=backend != "torch"), (stage.name,))


def score_by_torchvision(network: RAFT, generated: Tensor, reference: Tensor, floor: float) -> Tensor:
    """Return what `scored` should be, for videos whose sizes RAFT needs no resizing for."""

    def of(video: Tensor) -> Tensor:
        flow = network(video[0, :-1] * 2 - 1, video[0, 1:] * 2 - 1, num_flow_updates=UPDATES)[-1]
        diagonal = (video.shape[-2] ** 2 + video.shape[-1] ** 2) ** 0.5
        return flow.square().sum(dim=1).sqrt().mean() / diagonal + floor

    return -(of(generated) / of(reference)).log().square()


def test_score_and_gradient_of_raft_are_torchvisions(raft: tuple[RAFT, MotionReward]) -> None:
    network, reward = raft
    reference = moving(1, 3, 128)
    frames, same = (moving(4, 3, 128).clone().requires_grad_() for _ in range(2))
    ours = scored(reward, frames, reference, served(reward)).score.sum()
    theirs = score_by_torchvision(network, same, reference, reward.config.floor)
    assert ours < 0
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-6)
    ours.backward()
    theirs.backward()
    assert frames.grad is not None and same.grad is not None
    assert torch.cosine_similarity(frames.grad.flatten(), same.grad.flatten(), dim=0) > 0.999
    assert scored(reward, reference, reference, served(reward)).score == 0


def test_pairs_in_several_calls_are_those_of_one(
    raft: tuple[RAFT, MotionReward], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, reward = raft
    run, frames = served(reward), torch.cat([moving(1, 3), moving(4, 3)])
    together = reward.features(frames, run)
    assert together.shape == (2, 2, 2)
    monkeypatch.setattr(motion, "_PIXELS_AT_ONCE", 3 * 128 * 128)
    torch.testing.assert_close(reward.features(frames, run), together, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(reward.live_features(frames, run), together, rtol=1e-4, atol=1e-7)
    (live,) = reward.live_networks(VideoShape(2, 3, 64, 96))
    assert (live.stage, live.uses, live.inputs[0].shape) == ("motion_flow", 2, (1, 3, 128, 192))


# Tracing with dynamic sizes takes half a minute, and much longer if other processes use the cores.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines(
    backend: str,
    raft: tuple[RAFT, MotionReward],
    traces: Traces,
    tmp_path: Path,
    session_signing_key: Path,
) -> None:
    """Run at a size and a number of pairs that differ from those of the trace."""
    # Updates are unrolled: each further update is the same graph again.
    reward = MotionReward(raft[1].config.model_copy(update={"updates": 1}))
    (stage,) = reward.stages(ShapeRange())
    assert export_stage(stage, backend, EngineStore(tmp_path), traces=traces).manifest.verified
    frames = torch.nn.functional.interpolate(moving(3, 4)[0], (136, 150), mode="bicubic").clamp(0, 1)[None]
    expected = reward.features(frames, served(reward))
    torch.testing.assert_close(
        reward.features(frames, served(reward, backend, tmp_path)), expected, rtol=1e-3, atol=1e-6
    )


@pytest.fixture(scope="module")
def traces() -> Traces:
    """Return traces, from which the engines of all backends are built."""
    return Traces()
