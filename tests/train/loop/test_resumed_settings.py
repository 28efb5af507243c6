"""Runs with settings that draw, store or adapt values are bit for bit the same after a resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import Clips

from frostline.train import WanTrainingModule
from frostline.train.loop.resume import find_resume
from frostline.train.loop.run_dir import read_lines
from frostline.train.loop.trainer import RunOptions, train
from frostline.train.settings import TrainerSettings

MakeModule = Callable[..., WanTrainingModule]
QUICK: dict[str, Any] = {
    "num_inference_steps": 4,
    "grad_start_step": 1,
    "grad_end_step": 3,
    "rewards": [{"type": "sharpness", "baseline": 0.0, "scale": 1.0}],
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "random steps": ({"backprop": {"strategy": "random", "num_steps": 1}}, {}),
    "uniform steps": ({"backprop": {"strategy": "uniform", "num_steps": 2}}, {}),
    "the last step on fresh noise": ({"backprop": {"strategy": "last", "lv_samples": 2}}, {}),
    "one KL term": ({"backprop": {"kl_steps": "random:1"}}, {}),
    "a random window": ({"decode": {"num_latent_frames": 1}}, {}),
    "the base model's rollout": ({"rollout": {"policy": "base"}}, {}),
    "stale rollouts": ({"rollout": {"policy": "stale:3"}}, {}),
    "a KL target": ({"kl_target": 1e-3}, {}),
    "the data's clips": ({"sft_weight": 0.5}, {}),
    "an averaged adapter": ({}, {"ema_decay": 0.9}),
}
NOT_COMPARED = ("seconds", "stages", "peak_memory_gb")


def run(module: Any, out: Path, steps: int, resume: bool = False, **changes: Any) -> None:
    settings = {"learning_rate": 1e-3, "max_train_steps": steps, "checkpointing_steps": 1, "seed": 3, **changes}
    options = RunOptions(resume=find_resume(out, "latest") if resume else None)
    train(module, Clips(2, seed=11), TrainerSettings.parse(settings), out, options)


def compared(out: Path) -> Any:
    lines = [
        {name: value for name, value in line.items() if name not in NOT_COMPARED}
        for line in read_lines(out / "metrics.jsonl")
    ]
    files = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in [*out.glob("adapter*/*"), *out.glob("checkpoint-4/*.safetensors")]
    }
    return lines, files


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_equal_to_the_bit(case: str, make_module: MakeModule, tmp_path: Path) -> None:
    step, changes = CASES[case]
    settings = {**QUICK, **step}
    torch.manual_seed(0)
    run(make_module(**settings), tmp_path / "whole", 4, **changes)
    torch.manual_seed(0)
    run(make_module(**settings), tmp_path / "parts", 2, **changes)
    run(make_module(**settings), tmp_path / "parts", 4, resume=True, **changes)
    (lines, files), (whole_lines, whole_files) = compared(tmp_path / "parts"), compared(tmp_path / "whole")
    assert lines == whole_lines
    assert files == whole_files
