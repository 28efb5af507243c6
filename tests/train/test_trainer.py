"""The training loop: what it writes, that it repeats itself, and that it trains the LoRA alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from frostline.config import TrainingModuleSettings
from frostline.errors import ConfigError
from frostline.models.tiny.clips import held_out_clips
from frostline.train.data import Sample
from frostline.train.evaluation import evaluate
from frostline.train.settings import TrainerSettings
from frostline.train.trainer import train

SETTINGS = TrainerSettings(learning_rate=1e-3, max_train_steps=2, per_device_train_batch_size=1, seed=3)


class _Clips(Dataset[Sample]):
    def __init__(self, count: int) -> None:
        self.clips = held_out_clips(count, seed=11)

    def __len__(self) -> int:
        return len(self.clips.video)

    def __getitem__(self, index: int) -> Sample:
        return {"sample_id": f"clip {index}", "prompt": self.clips.prompts[index], "video": self.clips.video[index]}


@pytest.fixture(scope="module")
def clips() -> _Clips:
    return _Clips(2)


@pytest.fixture(scope="module")
def runs(make_module: Any, clips: _Clips, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Path]]:
    """The same run, twice, from the same start."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for name in ("first", "second"):
        torch.manual_seed(0)
        module = make_module("tiny", noise_seed=None)
        train(module, clips, SETTINGS, folder / name)
        made.append((module, folder / name))
    return made


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_a_line_of_metrics(runs: list[tuple[Any, Path]]) -> None:
    lines = _lines(runs[0][1])
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["learning_rate"] == SETTINGS.learning_rate
        assert 0 <= line["detection_rate"] <= 1
        assert line["grad_norm"] > 0
        assert len(line["kl"]) == 4
        assert line["sample_id"][0].startswith("clip ")
        assert line["stages"]["backward"]["ms"] > 0
        assert line["stages"]["denoise_tail"]["backend"] == "torch"


def test_the_same_seed_gives_the_same_run(runs: list[tuple[Any, Path]]) -> None:
    first, second = (_lines(folder) for _, folder in runs)
    for one, other in zip(first, second, strict=True):
        assert (one["loss"], one["kl"], one["sample_id"]) == (other["loss"], other["kl"], other["sample_id"])
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for _, folder in runs]
    assert adapters[0] == adapters[1]


def test_only_the_lora_moves(runs: list[tuple[Any, Path]], make_module: Any) -> None:
    trained, fresh = runs[0][0], make_module("tiny")
    lora = trained.trainable_parameters()
    start = fresh.trainable_parameters()
    assert any(not torch.equal(lora[name], start[name]) for name in lora)
    frozen = {name: p for name, p in trained.components.denoiser.named_parameters() if name not in lora}
    before = dict(fresh.components.denoiser.named_parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())


def test_evaluation_does_not_depend_on_the_batch(make_module: Any, clips: _Clips) -> None:
    module = make_module("tiny")
    together, alone = (evaluate(module, clips, range(2), batch_size=size) for size in (2, 1))
    torch.testing.assert_close(together.videos, alone.videos, atol=1e-4, rtol=0)
    torch.testing.assert_close(together.measured["face_score"], alone.measured["face_score"], atol=1e-3, rtol=0)
    assert together.measured["psnr"].shape == together.measured["detection_rate"].shape == (2,)
    expected = -10 * torch.log10((together.videos - clips.clips.video).pow(2).flatten(1).mean(1))
    torch.testing.assert_close(together.measured["psnr"], expected)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rat": 1}, "learning_rate"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"max_train_steps": 0}, "max_train_steps"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainerSettings.parse(values)


def test_nested_settings_name_where_they_are_wrong() -> None:
    with pytest.raises(ConfigError, match=r"reward\.weigth: unknown setting, is weight meant"):
        TrainingModuleSettings.parse({"reward": {"weigth": 1}})
