"""Runs on prompts only, and the errors if a model or a reward needs more."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_t2v import write_tiny_t2v
from torch import Tensor

from frostline.errors import DataError
from frostline.progress import Progress
from frostline.rewards.active import RewardStages
from frostline.rewards.config import RewardConfig
from frostline.rewards.inputs import RewardInputs
from frostline.rewards.reward import Reward, RewardScore
from frostline.score.request import pairs_of_file
from frostline.train.dry_run import print_dry_run
from frostline.train.launch import run_training
from frostline.train.settings import RunSettings
from frostline.train.validate_settings import check_output
from frostline.video import read_video


class NeedsNothing(RewardConfig):
    needs: ClassVar[frozenset[Any]] = frozenset()


class Brightness(Reward):
    """The mean of the generated frames."""

    Config = NeedsNothing
    name = "mean"

    def __init__(self, config: RewardConfig) -> None:
        pass

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        mean = frames.flatten(1).mean(dim=1)
        return RewardScore(mean, torch.ones_like(mean, dtype=torch.bool))


PLAIN = {"type": "test_without_video:Brightness", "weight": 1.0}
SHARPNESS = {"type": "sharpness", "weight": 1.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_t2v(tmp_path_factory.mktemp("models") / "tiny-t2v")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write `prompts.txt`, and `rows.csv`, in which only the first two rows have a reference; return the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a person nods\n\na person talks\n")
    (tmp_path / "rows.csv").write_text("prompt,reference\none,face.png\ntwo,face.png\nthree,\n")
    Image.new("RGB", (40, 56), (10, 200, 90)).save(tmp_path / "face.png")
    return tmp_path


def settings(model: Path | str, source: str, reward: dict[str, Any], **others: Any) -> RunSettings:
    cut = {"source": source, "num_frames": 5, "max_pixels": 32 * 32}
    return RunSettings.parse(
        {
            "model": str(model),
            "device": "cpu",
            "output_dir": "run",
            "num_inference_steps": 2,
            "grad_start_step": 1,
            "grad_end_step": 1,
            "gradient_checkpointing": "none",
            "lora": {"rank": 2},
            "plan": {"backend": "torch", "engines": "engines"},
            "rewards": [reward],
            "data": cut,
            "validation": {**cut, "num_videos": 2, "steps": 1},
            "train": {"max_train_steps": 1, "checkpointing_steps": 1},
            **others,
        }
    )


def dry_run(run: RunSettings) -> tuple[bool, str]:
    console = Console(width=300, record=True, force_terminal=False)
    return print_dry_run(run, console), console.export_text()


def test_a_run_on_prompts(model: Path, workplace: Path) -> None:
    run = settings(model, "prompts.txt", PLAIN)
    could, page = dry_run(run)
    assert could, page
    assert "data: 2 of 2 rows are valid" in page and "fewer than" not in page
    run_training(run, None, Progress(quiet=True))
    (step,) = (json.loads(line) for line in (workplace / "run" / "metrics.jsonl").read_text().splitlines())
    assert step["mean"] > 0
    for line in (workplace / "run" / "validation.jsonl").read_text().splitlines():
        look = json.loads(line)
        assert look["psnr"] is None and look["starts"]["psnr"] == [None, None]
        assert 0 < look["mean"] < 1
    assert (workplace / "run" / "report.html").is_file()
    folder = workplace / "run" / "validation"
    assert not (folder / "truth").exists() and (folder / "step-000001" / "contact_sheet.png").is_file()
    with (folder / "step-000001.csv").open(newline="") as file:
        rows = [(row["video"], row["reference"], row["prompt"]) for row in csv.DictReader(file)]
    assert rows == [("step-000001/0.mp4", "", "a person nods"), ("step-000001/1.mp4", "", "a person talks")]


def test_references_of_rows_without_a_video(model: Path, workplace: Path) -> None:
    """Skip rows that cannot be scored; store the reference pictures of validation samples for `frostline score`."""
    run = settings(model, "rows.csv", SHARPNESS)
    skipping = run.data.model_copy(update={"bad_rows": "skip"})
    run_training(run.model_copy(update={"data": skipping}), None, Progress(quiet=True))
    folder = workplace / "run" / "validation"
    pairs = pairs_of_file(folder / "step-000001.csv")
    assert [(pair.reference, pair.fault) for pair in pairs] == [
        (str(folder / "reference" / f"{row}.mp4"), "") for row in range(2)
    ]
    kept = read_video(folder / "reference" / "0.mp4")
    assert kept.shape == (1, 3, 56, 40)
    assert (kept.float() - torch.tensor([10.0, 200, 90])[:, None, None]).abs().max() < 4
    look = json.loads((workplace / "run" / "validation.jsonl").read_text().splitlines()[-1])
    assert all(value is not None for value in look["starts"]["sharpness"])
    # A new run may delete what this run wrote.
    assert check_output(run.model_copy(update={"overwrite_output_dir": True}), None) is None


REFUSED = {
    "reward": ("t2v", "rows.csv", SHARPNESS, [4], "but the reward sharpness needs a reference"),
    "clip": ("t2v", "rows.csv", {"type": "motion"}, [2, 3, 4], "but the reward motion needs the clip itself"),
    "model": ("tiny", "prompts.txt", PLAIN, [1, 3], "is empty, but the model tiny needs a first frame"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_are_named_that_need_a_video(name: str, model: Path, workplace: Path) -> None:
    kind, source, reward, rows, words = REFUSED[name]
    run = settings(model if kind == "t2v" else kind, source, reward, validation={"source": None})
    could, page = dry_run(run)
    assert not could
    for row in rows[:1]:
        assert f"row {row} (sample row-{row}), field 'video': " in page and words in page
    with pytest.raises(DataError, match=words) as caught:
        run_training(run, None, Progress(quiet=True))
    assert f"row {rows[0]} " in str(caught.value)
    assert not (workplace / "run").exists()
