"""A user's reward with a stage: exported, run, cached, copied and planned; hybrid equals PyTorch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_rewards import Likeness
from steps import QUICK, assert_hybrid_is_pytorch, small_clips

from frostline.errors import ConfigError
from frostline.export.export_cache import receipt_key
from frostline.export.exporter import export_stage
from frostline.export.model import load_staged_model
from frostline.export.recipe import Recipe
from frostline.export.run import ExportOptions, export_model
from frostline.models.video_shape import VideoShape
from frostline.rewards.build import resolve
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.engines.store import EngineStore
from frostline.train import WanTrainingModule
from frostline.train.memory.memory_profile import measure_rewards
from frostline.train.settings import RunSettings
from frostline.train.validate_settings import problems

MakeModule = Callable[..., WanTrainingModule]
LIKENESS = {"type": "own_rewards:Likeness", "options": {"seed": 3}, "weight": 1.0}


def make(make_module: MakeModule, **settings: Any) -> WanTrainingModule:
    return make_module(rewards=[LIKENESS], **QUICK, **settings)


def likeness(module: WanTrainingModule) -> Likeness:
    reward = module.rewards[0].reward
    assert isinstance(reward, Likeness)
    return reward


def test_hybrid_is_pytorch(make_module: MakeModule, tmp_path: Path) -> None:
    module, data = make(make_module), small_clips(2)
    store = EngineStore(tmp_path)
    assert export_stage(module.stages["features"], "onnxruntime", store).manifest.verified
    plan = {"*": "torch", "features": "onnxruntime"}
    hybrid = make(make_module, plan=plan, engines=tmp_path)
    assert hybrid.runtime.plan["features"].backend == "onnxruntime"
    assert_hybrid_is_pytorch(module, hybrid, data)
    assert hybrid.last_metrics is not None
    assert hybrid.last_metrics.stages["features"].backend == "onnxruntime"
    assert hybrid.last_metrics.stages["features_live"].backend == "torch"
    assert hybrid.last_metrics.per_sample["words"] == [len(prompt.split()) for prompt in data["prompt"]]
    # In the second step, the references are read from the cache.
    hybrid(data)
    assert "features" not in hybrid.last_metrics.stages
    # The references also depend on the prompt, and on the weights of the stage.
    hybrid({**data, "prompt": ["another prompt", data["prompt"][1]]})
    assert hybrid.last_metrics.stages["features"].calls == 1
    assert hybrid.last_metrics.per_sample["words"][0] == 2


def test_a_copy_has_rewards_of_its_own(make_module: MakeModule) -> None:
    module, data = make(make_module), small_clips(1)
    copied = copy.deepcopy(module)
    network = likeness(copied).features
    assert network is not likeness(module).features
    assert copied.stages["features"].networks[0].module is network
    assert any(part is network for part in copied.modules())
    before = module(data)[0].item()
    assert copied(data)[0].item() == before
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    assert copied(data)[0].item() != before
    assert module(data)[0].item() == before


def test_networks_are_registered_frozen_and_never_wake(make_module: MakeModule) -> None:
    module = make(make_module).train()
    network = likeness(module).features
    assert {id(p) for p in network.parameters()} <= {id(p) for p in module.parameters()}
    assert not any(part.training for part in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    data = small_clips(1)
    assert module(data)[0].item() == module(data)[0].item(), "dropout must be off"


def test_another_weight_of_the_stage_recalls_nothing(make_module: MakeModule, tmp_path: Path) -> None:
    data = small_clips(1)
    make(make_module, cache_dir=tmp_path).forward_preprocess(data)
    for seed, stages in ((3, {}), (4, {"features"})):
        reward = {**LIKENESS, "options": {"seed": seed}}
        module = make_module(rewards=[reward], cache_dir=tmp_path, **QUICK)
        with module.runtime.clock.collect() as times:
            module.forward_preprocess(data)
        assert {*times.read()} == {*stages}


def test_it_is_exported_by_its_recipe(tmp_path: Path) -> None:
    recipe = Recipe.parse(
        {"model": "tiny", "stages": "features", "rewards": [{**LIKENESS, "options": {"seed": 3}}], "precision": "fp32"}
    )
    (row,) = export_model(load_staged_model(recipe, "cpu"), recipe, EngineStore(tmp_path), ExportOptions())
    assert (row.stage, row.status) == ("features", "built")
    unknown = recipe.model_copy(update={"stages": ("featurse",)})
    with pytest.raises(
        ConfigError, match=r"the model has no stage 'featurse'; valid stages: text_encoder, .*, features"
    ):
        list(export_model(load_staged_model(unknown, "cpu"), unknown, EngineStore(tmp_path), ExportOptions()))


def test_an_export_is_reused_by_the_files_that_a_reward_names(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"

    def key() -> str:
        options = {"seed": 3, "of": [str(file)], "text": "x" * 9999}
        recipe = Recipe.parse({"model": "tiny", "rewards": [{"type": "own_rewards:Likeness", "options": options}]})
        return receipt_key(recipe, BuildOptions(), "cpu", {})

    keys = {key()}
    for content in ("one", "another"):
        file.write_text(content)
        keys.add(key())
        assert key() in keys
    assert len(keys) == 3


def test_plans_count_it() -> None:
    rewards = resolve(Recipe.parse({"model": "tiny", "rewards": [LIKENESS]}).rewards)
    assert [(use.stage, use.live, use.count) for use in rewards[0].uses] == [
        ("features", False, 1),
        ("features", True, 1),
    ]
    reward = Likeness(rewards[0])  # type: ignore[arg-type]
    small, large = (measure_rewards([reward], VideoShape(1, frames, 32, 32))["features"].kept for frames in (5, 10))
    assert large == 2 * small > 0
    assert measure_rewards([reward], VideoShape(1, 5, 64, 64))["features"].kept > 3 * small
    both = measure_rewards([reward, Likeness(rewards[0])], VideoShape(1, 5, 32, 32))  # type: ignore[arg-type]
    assert {name: footprint.kept for name, footprint in both.items()} == {"features": small, "features #2": small}


@pytest.mark.parametrize("runs", [True, False])
def test_a_plan_names_its_stage(runs: bool) -> None:
    """Report an unknown stage only in a run: a dry run imports no class, so it cannot know the stages."""
    settings = {"rewards": [LIKENESS], "plan": {"backend": "torch", "stages": {"features": "torch"}}}
    assert list(problems(RunSettings.parse(settings), runs)) == []
    settings["plan"] = {"backend": "torch", "stages": {"feature": "torch"}}
    found = [str(problem) for problem in problems(RunSettings.parse(settings), runs)]
    assert [problem.startswith("plan.stages: there is no stage 'feature'; valid") for problem in found] == [True] * runs
