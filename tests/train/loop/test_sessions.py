"""The sessions of a run in `run.json`: each command, its times, and the backends of its validations."""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from steps import Clips

from frostline.train.loop.resume import find_resume
from frostline.train.loop.trainer import RunOptions, train
from frostline.train.settings import TrainerSettings

QUICK: dict[str, Any] = {"num_inference_steps": 2, "grad_start_step": 1, "grad_end_step": 1}
REWARD: dict[str, Any] = {"rewards": [{"type": "sharpness"}]}


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_each_command_is_a_session(make_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = Clips(2, seed=11)
    plan: dict[str, Any] = {"is": "planned"}

    def go(steps: int, command: list[str], resume: bool) -> None:
        module = make_module(**QUICK, **REWARD)

        def look(step: int) -> dict[str, Any]:
            for backend in ("onnxruntime", "torch", "torch"):
                with module.runtime.clock.measure("vae_decoder", backend):
                    pass
            return {}

        monkeypatch.setattr(sys, "argv", command)
        options = RunOptions(
            resume=find_resume(tmp_path, "latest") if resume else None,
            facts=lambda: dict(plan),
            validate=look,
            validation_steps=10,
        )
        train(module, clips, TrainerSettings(max_train_steps=steps), tmp_path, options)

    go(1, ["frostline", "train", "my config.yaml"], resume=False)
    first = facts(tmp_path)
    assert first["is"] == "planned" and len(first["sessions"]) == 1
    plan["is"] = "chosen"
    go(3, ["frostline", "train", "--resume", "run"], resume=True)
    second = facts(tmp_path)
    assert second["is"] == "chosen"
    assert second["sessions"][0] == first["sessions"][0]
    assert [each["command"] for each in second["sessions"]] == [
        "frostline train 'my config.yaml'",
        "frostline train --resume run",
    ]
    assert [(each["first_step"], each["last_step"]) for each in second["sessions"]] == [(0, 1), (1, 3)]
    # Validations before the first step, and at the end of each session.
    assert [each["validation_calls"] for each in second["sessions"]] == [
        {"vae_decoder": {"onnxruntime": 2, "torch": 4}},
        {"vae_decoder": {"onnxruntime": 1, "torch": 2}},
    ]
    for each in second["sessions"]:
        began, until = (datetime.fromisoformat(each[name]) for name in ("began", "until"))
        assert began.utcoffset() is not None and began <= until


def test_metrics_count_the_calls_of_each_backend(make_module: Any, tmp_path: Path) -> None:
    train(make_module(**QUICK, **REWARD), Clips(2, seed=11), TrainerSettings(max_train_steps=2), tmp_path, RunOptions())
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        assert line["peak_memory_gb"] > 0.05
        tail = line["stages"]["denoise_tail"]
        assert tail["backend"] == "torch" and tail["backends"]["torch"]["calls"] == 1
        assert tail["backends"]["torch"]["ms"] == pytest.approx(tail["ms"])
