"""The stages of vision rewards on the engines that run here, in a training step, in plans and in exports."""

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import QUICK, assert_hybrid_is_pytorch, small_clips
from vision_files import IMAGE_SIZE

from frostline.export.export_cache import receipt_key
from frostline.export.exporter import export_stage
from frostline.export.recipe import Recipe
from frostline.export.tracing.trace_cache import Traces
from frostline.models.video_shape import VideoShape
from frostline.rewards.active import ActiveReward
from frostline.rewards.build import resolve
from frostline.rewards.config import RewardEntry, stage_names
from frostline.rewards.frame_selection import count_selected, select_frames
from frostline.rewards.inputs import RewardInputs
from frostline.runtime.backends import get_backend
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.runtime import Runtime
from frostline.train import WanTrainingModule
from frostline.train.memory.memory_profile import judge_bytes, measure_rewards

MakeModule = Callable[..., WanTrainingModule]
Build = Callable[..., tuple[ActiveReward, Runtime]]
BACKENDS = ("onnxruntime", "openvino")
STAGES = {
    "clip": ("clip_text", "clip_image"),
    "pickscore": ("pickscore_text", "pickscore_image"),
    "hpsv2": ("hpsv2_text", "hpsv2_image"),
    "aesthetic": ("aesthetic_image",),
    "subject_consistency": ("subject_consistency_image",),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path) -> EngineStore:
    return EngineStore(tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "subject_consistency"])
def test_engines(name: str, build_alone: Build, store: EngineStore) -> None:
    """Test pickscore also for clip and aesthetic, which have the same networks."""
    active, _ = build_alone(name)
    assert {*active.stage_names} == {*STAGES[name]}
    for stage in active.stages:
        traces = Traces()
        for backend in BACKENDS:
            exported = export_stage(stage, backend, store, traces=traces)
            assert exported.manifest.verified
            serve = Runtime({stage.name: stage}, backend, store.root, strict=True)[stage.name]
            (spec,) = stage.networks[0].inputs
            for count in (1, 3, 16):
                values = spec.random((count, *spec.shape[1:]), torch.Generator().manual_seed(count))  # type: ignore[arg-type]
                features = serve(**{spec.name: values})["features"]
                torch.testing.assert_close(features, stage.torch({spec.name: values})["features"], atol=2e-5, rtol=0)
                assert features.norm(dim=1).sub(1).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "stage_name", "backend"),
    [
        ("subject_consistency", "subject_consistency_image", "tensorrt-rtx"),
        ("clip", "clip_text", "aotinductor"),
    ],
)
def test_it_builds_for_the_other_backends(
    name: str, stage_name: str, backend: str, build_alone: Build, store: EngineStore
) -> None:
    """Build DINOv2 for TensorRT, which needs no GPU, and CLIP's text tower for AOTInductor, which also runs here."""
    if backend == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    elif (reason := get_backend(backend).unavailable()) is not None:
        pytest.skip(reason)
    (stage,) = (stage for stage in build_alone(name)[0].stages if stage.name == stage_name)
    exported = export_stage(stage, backend, store)
    assert exported.built
    assert all(artifact.bytes > 0 for artifact in exported.manifest.artifacts.values())
    if backend == "aotinductor":
        assert exported.manifest.verified
        serve = Runtime({stage.name: stage}, backend, store.root, strict=True)[stage.name]
        (spec,) = stage.networks[0].inputs
        tokens = spec.random((5, *spec.shape[1:]), torch.Generator().manual_seed(5))  # type: ignore[arg-type]
        expected = stage.torch({"tokens": tokens})["features"]
        torch.testing.assert_close(serve(tokens=tokens)["features"], expected, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def modules(
    make_module: MakeModule, vision_files: Mapping[str, Any], store: EngineStore
) -> tuple[WanTrainingModule, WanTrainingModule]:
    """Return a module with all stages in PyTorch, and one with engines for all frozen stages of the rewards."""
    rewards = [
        {"type": "sharpness", "weight": 0.5},
        {**vision_files["pickscore"], "weight": 0.3},
        {**vision_files["subject_consistency"], "anchor": "reference", "weight": 1.0},
    ]
    module = make_module(rewards=rewards, **QUICK)
    names = (*STAGES["pickscore"], *STAGES["subject_consistency"])
    for name in names:
        assert export_stage(module.stages[name], "onnxruntime", store).manifest.verified
    plan = {"*": "torch", **dict.fromkeys(names, "onnxruntime")}
    return module, make_module(rewards=rewards, plan=plan, engines=store.root, **QUICK)


def test_hybrid_is_pytorch(modules: tuple[WanTrainingModule, WanTrainingModule]) -> None:
    module, hybrid = modules
    data = small_clips(2)
    assert_hybrid_is_pytorch(module, hybrid, data)
    metrics = hybrid.last_metrics
    assert metrics is not None
    assert list(metrics.scores) == ["sharpness", "pickscore", "subject_consistency"]
    backends = {name: metrics.stages[name].backend for name in metrics.stages}
    assert backends["pickscore_text"] == backends["subject_consistency_image"] == "onnxruntime"
    assert backends["pickscore_image_live"] == backends["subject_consistency_image_live"] == "torch"
    assert "pickscore_image" not in backends, "frames that need a gradient must not be encoded twice"
    # In the second step, prompts and references are read from the cache; another prompt is encoded.
    hybrid(data)
    assert hybrid.last_metrics is not None
    assert not {"pickscore_text", "subject_consistency_image"} & hybrid.last_metrics.stages.keys()
    hybrid({**data, "prompt": ["another prompt", data["prompt"][1]]})
    assert hybrid.last_metrics.stages["pickscore_text"].calls == 1


def test_scores_without_gradient_are_computed_by_engines(
    modules: tuple[WanTrainingModule, WanTrainingModule],
) -> None:
    data, scores = small_clips(1), []
    for module in modules:
        conditioning = module.forward_preprocess(data)
        with torch.no_grad(), module.runtime.clock.collect() as times:
            scored = module.score(data["video"].flip(1), conditioning)
        scores.append([score.score for _, score in scored])
    served = {name: time.backend for name, time in times.read().items()}
    assert served == dict.fromkeys(("pickscore_image", "subject_consistency_image"), "onnxruntime")
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_plans_count_it(name: str, build_alone: Build, vision_files: Mapping[str, Any]) -> None:
    entry = RewardEntry.parse(vision_files[name])
    assert stage_names([entry]) is not None
    assert {*(stage_names([entry]) or ())} == {*STAGES[name]}
    (config,) = resolve([entry])
    assert [(use.stage, use.count) for use in config.uses if use.live] == [(f"{name}_image", 1)]
    shape = VideoShape(2, 9, 64, 64)
    active, _ = build_alone(name)
    (live,) = active.reward.live_networks(shape)
    assert (live.stage, live.uses) == (f"{name}_image", 2 * (9 if name == "subject_consistency" else 8))
    assert live.inputs[0].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    whole = measure_rewards([active.reward], shape)[f"{name}_image"].kept
    assert whole > 0
    # In training, all networks of the reward are in memory, as for a judge.
    planned = measure_rewards([active.reward], shape)
    assert sum(each.weights for each in planned.values()) == judge_bytes(active.reward, active.config)[1]
    assert (f"{name} (frozen)" in planned) == (name != "subject_consistency"), (
        "only subject_consistency has no text tower and no predictor"
    )
    if not config.needs_neighbours:
        few = build_alone(name, frames="random:2")[0].reward
        assert measure_rewards([few], shape)[f"{name}_image"].kept == whole // 4


@pytest.mark.parametrize("name", ["hpsv2", "aesthetic"])
def test_a_copy_has_networks_of_its_own(name: str, build_alone: Build, video: torch.Tensor) -> None:
    active, runtime = build_alone(name)
    copied, copied_runtime = copy.deepcopy((active, runtime))
    reward: Any = copied.reward
    sample = RewardInputs(("a cat", "a person"), video, (5, 5))
    assert reward.image is not active.reward.image  # type: ignore[attr-defined]
    (image,) = (stage for stage in copied.stages if stage.name == f"{name}_image")
    assert image.networks[0].module is reward.image
    scores = [
        one.score(video, sample, one.references(sample, served), served).score
        for one, served in ((active, runtime), (copied, copied_runtime))
    ]
    torch.testing.assert_close(scores[0], scores[1])


def test_settings_are_read_without_torch() -> None:
    code = (
        "import sys; from frostline.rewards.config import RewardEntry\n"
        f"for name in {[*STAGES]}: RewardEntry.parse({{'type': name, 'weights': '~/x'}})\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("selection", ["all", "first", "last", "every:1", "every:3", "random:2", "random:50"])
@pytest.mark.parametrize("num_frames", [1, 2, 5, 10])
def test_as_many_frames_are_counted_as_are_selected(selection: str, num_frames: int) -> None:
    selected = select_frames(torch.zeros(1, num_frames, 3, 1, 1), selection)
    assert count_selected(num_frames, selection) == selected.shape[1] - 1


def test_an_export_is_reused_by_the_files_of_a_folder(vision_files: Mapping[str, Any], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(vision_files["clip"]["weights"]) / name).read_bytes())
    recipe = Recipe.parse({"model": "tiny", "rewards": [{"type": "clip", "weights": str(tmp_path)}]})
    keys = {receipt_key(recipe, BuildOptions(), "cpu", {}) for _ in range(2)}
    (tmp_path / "model.safetensors").write_bytes(b"others")
    keys.add(receipt_key(recipe, BuildOptions(), "cpu", {}))
    assert len(keys) == 2
