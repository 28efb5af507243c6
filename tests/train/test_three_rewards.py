"""A run with rewards of a face, a prompt and motion decodes once per step, trains, and resumes bit for bit."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from steps import assert_same_steps, clips, small_clips
from vision_files import write_clip

from frostline.export.exporter import export_stage
from frostline.export.tracing.trace_cache import Traces
from frostline.models.tiny.clips import held_out_clips
from frostline.progress import Progress
from frostline.runtime.engines.store import EngineStore
from frostline.train import WanTrainingModule
from frostline.train.launch import run_training
from frostline.train.settings import RunSettings
from frostline.video import write_video

if TYPE_CHECKING:
    from conftest import RewardTape

MakeModule = Callable[..., WanTrainingModule]
STEPS: dict[str, Any] = {"num_inference_steps": 3, "grad_start_step": 1, "grad_end_step": 2}


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return [
        {"type": "face_identity", "detector": "yunet"},
        {"type": "pickscore", "weights": str(folder), "frames": "random:2", "weight": 0.2},
        {"type": "motion", "weight": 0.05},
    ]


def test_resumes_to_the_bit(tmp_path: Path, rewards: list[dict[str, Any]]) -> None:
    """Draw other frames in each step."""
    held_out = held_out_clips(3, seed=2, num_frames=5, size=64)
    rows = [{"video": f"{index}.mp4", "prompt": prompt} for index, prompt in enumerate(held_out.prompts)]
    for row, video in zip(rows, held_out.video, strict=True):
        write_video(tmp_path / row["video"], video, lossless=True)
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, resume: str | None = None) -> Path:
        settings = {
            **STEPS,
            "model": "tiny",
            "device": "cpu",
            "output_dir": tmp_path / name,
            "lora": {"rank": 2},
            "plan": {"backend": "torch", "engines": tmp_path / "engines"},
            "rewards": rewards,
            "data": {"source": tmp_path / "metadata.jsonl", "num_frames": 5},
            "train": {"learning_rate": 1e-3, "max_train_steps": 4, "checkpointing_steps": 2},
        }
        run_training(RunSettings.parse(settings), resume, Progress(quiet=True))
        return tmp_path / name

    whole = run("whole")
    resumed = run("resumed", str(whole / "checkpoint-2"))
    adapter = "adapter/adapter_model.safetensors"
    assert (resumed / adapter).read_bytes() == (whole / adapter).read_bytes()
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert {"face_score", "detection_rate", "pickscore", "motion", "motion_ratio"} <= lines[-1].keys()
    assert len({line["pickscore"] for line in lines}) == 4


def test_a_step_decodes_once(make_module: MakeModule, rewards: list[dict[str, Any]]) -> None:
    module = make_module(rewards=rewards, **STEPS)
    loss, _, _ = module(small_clips(2))
    loss.backward()
    metrics = module.last_metrics
    assert metrics is not None
    assert metrics.stages["vae_decoder_live"].calls == 1
    assert list(metrics.scores) == ["face_score", "pickscore", "motion"]
    assert torch.stack([p.grad.norm() for p in module.trainable_parameters().values() if p.grad is not None]).sum() > 0


@pytest.fixture(scope="module")
def traces() -> Mapping[str, Traces]:
    """Return traces by stage, from which the engines of both backends are built."""
    return defaultdict(Traces)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_hybrid_is_pytorch(
    backend: str,
    make_module: MakeModule,
    rewards: list[dict[str, Any]],
    traces: Mapping[str, Traces],
    tape: "RewardTape",
    tmp_path: Path,
) -> None:
    """Use engines for all frozen stages of the rewards; motion of pixels has no network."""
    faces, prompt, motion = rewards
    settings = {"rewards": [faces, {**prompt, "frames": "every:2"}, motion], **STEPS}
    module, store = make_module(**settings), EngineStore(tmp_path)
    names = ("face_detector", "face_embedder", "pickscore_text")
    for name in names:
        assert export_stage(module.stages[name], backend, store, traces=traces[name]).manifest.verified
    plan = {"*": "torch", **dict.fromkeys(names, backend)}
    hybrid = make_module(plan=plan, engines=tmp_path, **settings)
    data = clips(1, seed=7, num_frames=5)
    assert_same_steps(module, hybrid, data, tape)
    metrics = hybrid.last_metrics
    assert metrics is not None
    assert list(metrics.scores) == ["face_score", "pickscore", "motion"]
    assert metrics.per_sample["detection_rate"][0] > 0
    assert {metrics.stages[name].backend for name in names} == {backend}
    assert metrics.stages["pickscore_image_live"].backend == "torch"
