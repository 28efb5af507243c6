"""Progress: what a log shows of it, where there is no screen."""

import io

import pytest
from rich.console import Console

from frostline import progress as progress_file
from frostline.progress import Progress


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_file, "_SECONDS_A_LINE", 0.0)
    log = io.StringIO()
    shown = Progress()
    shown.console = Console(file=log, width=200)
    with shown.bar("train the LoRA", 30) as bar:
        for step in (1, 2):
            bar.describe(f"score 0.{step}, [dim]")
            bar.advance(1)
    lines = log.getvalue().splitlines()
    assert lines[:2] == ["train the LoRA: 1 of 30, score 0.1, [dim]", "train the LoRA: 2 of 30, score 0.2, [dim]"]
    assert "2/30" in lines[-1], "ended early, it says how far it came"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True).task("load"):
        pass
    assert capsys.readouterr() == ("", "")
