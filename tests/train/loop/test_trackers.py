"""Trackers: TensorBoard's file contains the values of `metrics.jsonl` and `validation.jsonl` at each step."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from steps import Clips
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from frostline.train.loop.trackers import PROJECT
from frostline.train.loop.trainer import RunOptions, train
from frostline.train.settings import TrainerSettings

SHARPNESS = {"type": "sharpness", "baseline": 0.0, "scale": 1.0}


@pytest.fixture(scope="module")
def run(make_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run three steps, one of them with a non-finite loss, and validation before and after; return the folder."""
    out = tmp_path_factory.mktemp("tracked")
    module = make_module(num_inference_steps=3, grad_start_step=1, grad_end_step=2, rewards=[SHARPNESS])
    forward, count = module.forward, iter(range(1, 10))

    def second_is_nan(data: Any) -> Any:
        loss, *others = forward(data)
        return loss * (math.nan if next(count) == 2 else 1), *others

    module.forward = second_is_nan
    options = RunOptions(
        config={"lora": {"rank": 8}, "noise_seed": None, "lr": 1e-3},
        validate=lambda step: {"psnr": 20.0 + step, "starts": {"psnr": [20.0]}},
        validation_steps=3,
    )
    settings = TrainerSettings(learning_rate=1e-3, max_train_steps=3, report_to=("tensorboard",))
    train(module, Clips(count=2, seed=11), settings, out, options)  # type: ignore[arg-type]
    return out


def curves(run: Path) -> dict[str, dict[int, float]]:
    (events,) = (run / "trackers" / PROJECT).glob("events.out.tfevents.*")
    written = EventAccumulator(str(events)).Reload()
    return {tag: {e.step: e.value for e in written.Scalars(tag)} for tag in written.Tags()["scalars"]}


def test_tensorboard_has_the_figures_of_every_step(run: Path) -> None:
    found = curves(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "score", "sharpness", "kl_loss", "grad_norm", "learning_rate", "seconds"):
        curve = found[f"train/{name}"]
        assert sorted(curve) == [1, 2, 3]
        for line in lines:
            wanted = line[name]
            value = curve[line["step"]]
            assert math.isnan(value) if wanted is None else value == pytest.approx(wanted, rel=1e-6)
    for line in lines:
        stage = found["train/stages/denoise_tail/ms"][line["step"]]
        assert stage == pytest.approx(line["stages"]["denoise_tail"]["ms"], rel=1e-6)
    assert math.isnan(found["train/loss"][2])
    assert found["validation/psnr"] == {0: 20.0, 3: 23.0}
