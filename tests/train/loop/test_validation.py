"""The CSV file that validation writes next to its clips."""

import csv
from pathlib import Path

import torch

from frostline.score.request import pairs_of_file
from frostline.train.data.dataset import Sample
from frostline.train.loop import validation as validation_module
from frostline.train.loop.evaluation import Evaluation
from frostline.train.loop.validation import Validation
from frostline.train.report.samples import _prompts

PROMPTS = ["=HYPERLINK(1)", "a smile", "-5 degrees"]


def samples() -> list[Sample]:
    return [
        {"sample_id": str(i), "prompt": prompt, "video": torch.rand(5, 3, 32, 32)} for i, prompt in enumerate(PROMPTS)
    ]


def test_no_prompt_is_a_formula(tmp_path: Path) -> None:
    validation = Validation(samples(), [0, 1, 2])
    evaluation = Evaluation({"psnr": torch.ones(3)}, torch.rand(3, 5, 3, 32, 32))
    validation_module._write(validation, evaluation, tmp_path, "step-000001")
    with (tmp_path / "step-000001.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == ["'=HYPERLINK(1)", "a smile", "'-5 degrees"]
    # frostline's own readers remove the apostrophe.
    assert [pair.prompt for pair in pairs_of_file(tmp_path / "step-000001.csv")] == PROMPTS
    assert _prompts(tmp_path / "step-000001.csv") == PROMPTS
