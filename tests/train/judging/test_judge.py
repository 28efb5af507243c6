"""Judges are rewards with separate stages, which are not part of the loss; invalid judges are refused."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from steps import clips
from torch import Tensor
from typer.testing import CliRunner

from frostline.cli import app
from frostline.config import OTHERS
from frostline.errors import ConfigError
from frostline.rewards.config import RewardEntry
from frostline.stages.shapes import ShapeRange
from frostline.train import WanTrainingModule
from frostline.train.config_file import commented_yaml, load_run_settings
from frostline.train.dry_run import print_dry_run
from frostline.train.judging.judge import Judge, build_judges
from frostline.train.loop.trainer import TrainOutcome
from frostline.train.settings import RunSettings
from frostline.train.validate_settings import problems

SFACE = {"type": "face_identity"}
YUNET = {"type": "face_identity", "detector": "yunet", "embedder": "dlib", "weight": 7.0, "baseline": 3.0}
SHARPNESS = {"type": "sharpness"}
OWN = {"type": "own_rewards:Likeness", "options": {"seed": 0}}


def settings(*judges: dict[str, Any], **changes: Any) -> RunSettings:
    return RunSettings.parse({"validation": {"source": "held_out", "judges": [*judges]}, **changes})


def judges_of(module: WanTrainingModule, *entries: dict[str, Any], plan: Any = "torch") -> tuple[Judge, ...]:
    parsed = [RewardEntry.parse(entry) for entry in entries]
    return build_judges(parsed, module, plan=plan, engines=None, strict=True, shapes=ShapeRange())


@pytest.fixture(scope="module")
def module(make_module: Any) -> WanTrainingModule:
    """Return a module that rewards faces, so that its stages have the same names as those of the judges."""
    return make_module(rewards=[SFACE])


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return clips(2, num_frames=5)


@pytest.fixture(scope="module")
def frames(data: dict[str, Any]) -> Tensor:
    """Return frames in which the second clip shows no face from frame 2 on."""
    frames = data["video"].clone()
    frames[1, 2:] = 0.5
    return frames


def test_a_judge_says_what_it_would_say_as_a_reward(
    module: WanTrainingModule, make_module: Any, data: dict[str, Any], frames: Tensor
) -> None:
    same, other, own = judges_of(module, SFACE, YUNET, OWN, plan={"vae_encoder": "torch", OTHERS: "torch"})
    assert [judge.name for judge in (same, other, own)] == ["judge_face_sface", "judge_face_dlib", "judge_likeness"]
    conditioning = module.forward_preprocess(data)
    (_, expected), *_ = module.score(frames, conditioning)
    said = same.score(frames, conditioning)
    torch.testing.assert_close(said.score, expected.score, atol=1e-6, rtol=0)
    assert said.metrics.keys() == {f"judge_face_sface_{name}" for name in expected.metrics}
    rewarded = make_module(rewards=[YUNET])
    (_, expected), *_ = rewarded.score(frames, rewarded.forward_preprocess(data))
    said = other.score(frames, conditioning)
    torch.testing.assert_close(said.score, expected.score, atol=1e-6, rtol=0)
    assert (said.score - same.score(frames, conditioning).score).abs().min() > 1e-3
    assert own.score(frames, conditioning).score.shape == (2,)


def test_frames_are_scored_one_by_one(module: WanTrainingModule, data: dict[str, Any], frames: Tensor) -> None:
    (judge,) = judges_of(module, SFACE)
    said = judge.score(frames, module.forward_preprocess(data))
    assert said.frame_scores is not None
    assert said.frame_scores.isnan().tolist() == [[False] * 5, [False] * 2 + [True] * 3]
    torch.testing.assert_close(said.frame_scores.nanmean(dim=1), said.score)
    assert not said.frame_scores.requires_grad


def test_references_are_computed_once(module: WanTrainingModule, data: dict[str, Any], frames: Tensor) -> None:
    first, second = (judges_of(module, YUNET)[0] for _ in range(2))
    conditioning = module.forward_preprocess(data)
    first.score(frames, conditioning)
    ran: Counter[str] = Counter()
    run = second.runtime.run

    def counted(stage: str, *arguments: Any, **options: Any) -> Any:
        ran[stage] += 1
        return run(stage, *arguments, **options)

    second.runtime.run = counted  # type: ignore[method-assign]
    second.score(frames, conditioning)
    assert ran == {"face_detector": 1}  # for the generated frames, which the live network embeds


def test_a_judge_stands_apart(module: WanTrainingModule) -> None:
    before = {name for name, _ in module.named_parameters()}
    (judge,) = judges_of(module, YUNET)
    assert {name for name, _ in module.named_parameters()} == before
    networks = [network.module for stage in judge.active.stages for network in stage.networks]
    assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())
    assert not any(network.training for network in networks)
    assert judge.runtime is not module.runtime


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize(
    ("judges", "said"),
    [
        (
            [SFACE, {**SFACE, "detector": "yunet"}],
            "validation.judges: two entries have the name 'face_sface': remove one",
        ),
        ([SHARPNESS, {**SFACE, "embedder": "facenet:gone.pt"}], "validation.judges.1 face_identity: "),
        ([{"type": "own_rewards:Gone"}], "validation.judges.0.type own_rewards:Gone: own_rewards has no class 'Gone'"),
    ],
    ids=["label twice", "no weights", "no class"],
)
def test_what_cannot_judge_is_told_before_the_run(judges: list[dict[str, Any]], said: str, runs: bool) -> None:
    assert any(said in str(problem) for problem in problems(settings(*judges), runs))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": {"stop_when_judge_falls": 2}}, "train.stop_when_judge_falls: requires a judge in"),
        (
            {"train": {"stop_when_judge_falls": 2}, "validation": {"judges": [SHARPNESS]}},
            "and samples in validation.source",
        ),
        (
            {"validation": {"source": "x", "judges": [{"type": "sharpnes"}]}},
            "validation.judges.0.type: there is no ",
        ),
        (
            {"validation": {"source": "x", "judges": [{**SHARPNESS, "flor": 1}]}},
            "validation.judges.0.flor: unknown ",
        ),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunSettings.parse(values)
    assert said in str(caught.value)


def test_settings_are_read_as_they_are_printed(tmp_path: Path) -> None:
    for judged in (settings(), settings(YUNET, OWN)):
        path = tmp_path / "config.yaml"
        path.write_text(commented_yaml(judged))
        assert load_run_settings(path) == judged


def test_stages_of_judges_may_be_planned() -> None:
    planned = {"plan": {"backend": "torch", "stages": {"face_detector": "torch"}}, "rewards": [SHARPNESS]}
    assert [*problems(settings(SFACE, **planned), runs=True)] == []
    (problem,) = problems(settings(SHARPNESS, **planned), runs=True)
    assert "plan.stages: there is no stage 'face_detector'" in str(problem)


def test_a_dry_run_counts_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: dict[str, int] = {}

    def plan(*_: Any, judges: dict[str, int], **__: Any) -> None:
        planned.update(judges)
        raise ConfigError("as far as this")

    monkeypatch.setattr("frostline.train.run_plan.memory_plan", plan)
    page = io.StringIO()
    judged = settings(SFACE, OWN, output_dir=str(tmp_path / "run"), memory={"device_gb": 1})
    print_dry_run(judged, Console(file=page, width=200))
    # Classes of users are not imported for a dry run.
    assert planned.keys() == {"judge_face_sface"}
    assert planned["judge_face_sface"] == pytest.approx(40e6, rel=0.05)
    assert "as far as this" in page.getvalue()


def test_the_terminal_says_what_came_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = TrainOutcome(20, 0, None, "the reward rises while a judge falls", stopped_by_judge=True)
    monkeypatch.setattr("frostline.train.launch.run_training", lambda *_: outcome)
    path = tmp_path / "config.yaml"
    path.write_text(commented_yaml(settings(SHARPNESS, train={"stop_when_judge_falls": 2, "max_train_steps": 40})))
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 0
    assert "validation samples: the reward rises while a judge falls\n" in result.output
    assert (
        "ended at step 20 of 40, because the score of a judge decreased in 2 consecutive validations" in result.output
    )
