"""Resuming a run by its folder only, from any working folder; its log file is continued; other folders are refused."""

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pseudo_terminal import on_terminal
from typer.testing import CliRunner

from frostline.cli import app
from frostline.errors import ConfigError, DataError
from frostline.models.tiny.clips import held_out_clips
from frostline.train.loop.run_dir import check_is_run
from frostline.train.take_up import find_run
from frostline.video import write_video

CONFIG = """
model: tiny
device: cpu
output_dir: my/run
num_inference_steps: 2
grad_start_step: 1
grad_end_step: 1
noise_seed: null
lora: {rank: 4}
plan: {backend: torch}
rewards: [{type: sharpness}]
data: {source: data, num_frames: 5, height: 32, width: 32}
train: {learning_rate: 1.0e-3, max_train_steps: 1, checkpointing_steps: 1}
"""
STEP = re.compile(
    r"\S+ \S+ DEBUG +frostline\.train\.launch: step (\d+): score -?\d\.\d{3}, KL .*, .* s/step; .*backward \d.*"
)


def train(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["train", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start a run of one step with relative paths; return the working folder."""
    folder = tmp_path_factory.mktemp("started")
    clips = held_out_clips(1, seed=2, num_frames=5, size=32)
    for index, video in enumerate(clips.video):
        write_video(folder / "data" / f"{index}.mp4", video, fps=8, lossless=True)
        (folder / "data" / f"{index}.txt").write_text("a person nods")
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("config.yaml")
    return folder


@pytest.fixture
def place(started: Path, tmp_path: Path) -> Path:
    """Return a copy of `started` that a test may change."""
    shutil.copytree(started, tmp_path / "started")
    facts = tmp_path / "started" / "my" / "run" / "run.json"
    facts.write_text(facts.read_text().replace(str(started), str(tmp_path / "started")))
    return tmp_path / "started"


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        (".", ["--resume", "my/run"]),
        ("my", ["--resume", "run/checkpoint-1"]),
        ("my/run", ["--resume", "latest"]),
        ("..", ["--resume", "latest", "--output-dir", "started/my/run"]),
    ],
    ids=["a run's folder", "a checkpoint's folder", "inside the run", "--output-dir"],
)
def test_a_run_goes_on_without_a_configuration_file(
    inside: str, arguments: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place / inside)
    train(*arguments, "train.max_train_steps=2")
    run = place / "my" / "run"
    assert steps(run) == [1, 2]
    log = (run / "frostline.log").read_text()
    assert [int(line[1]) for line in map(STEP.fullmatch, log.splitlines()) if line] == [1, 2], (
        "the second session must append to the log file"
    )
    assert log.count("command: ") == 2
    # The folder that relative paths refer to does not count as a changed setting.
    (changes,) = re.findall(r"resuming from (\S+) with other settings:\n((?:  .*\n)+)", log)
    assert changes == (str(run / "checkpoint-1"), "  train.max_train_steps: 2 (was 1)\n")
    assert "  VAE in" not in log and "loading tiny: " in log
    assert json.loads((run / "run.json").read_text())["working_dir"] == str(place)


def test_another_folder_begins_from_a_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.parent)
    train("--resume", "started/my/run", "--output-dir", "other", "train.max_train_steps=2")
    assert steps(place.parent / "other") == [1, 2]
    assert steps(place / "my" / "run") == [1]


def test_output_dir_goes_before_the_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert 'output_dir: "007"' in train("config.yaml", "--output-dir", "007", "--print-config")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume", "data"], "--resume data: data is not a run folder"),
        (["--resume", "nowhere"], "is not a run folder (no run.json and config.yaml of frostline)"),
        (["--resume", "latest"], "name the folder of a run, or a configuration file"),
        (["--resume", "latest", "--output-dir", "data"], "data is not a run folder"),
        (["--output-dir", "my/run"], "no configuration file"),
    ],
)
def test_what_is_no_run_is_not_taken_up(
    arguments: list[str], said: str, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(started)
    with pytest.raises(ConfigError) as error:
        train(*arguments)
    assert said in str(error.value)


def test_a_run_that_has_moved_is_taken_up_where_one_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = place / "my" / "run" / "run.json"
    facts.write_text(facts.read_text().replace(str(place), "/nowhere/at/all"))
    monkeypatch.chdir(place)
    found = find_run("my/run")
    assert (found.started_in, found.resume) == (None, "latest")
    found.enter()
    assert Path.cwd() == place


def test_a_run_on_a_terminal_of_80_columns(started: Path, tmp_path: Path) -> None:
    """Log lines and the bar with count, time and score are on separate lines; paths are in the log file."""
    again = tmp_path / "again"
    arguments = ["-m", "frostline", "train", "config.yaml", f"output_dir={again}"]
    seen = on_terminal(*arguments, cwd=started, columns=80)
    assert seen.code == 0, seen.text
    (bar,) = (line for line in seen.lines if "train the LoRA" in line)
    assert re.fullmatch(r"✓ train the LoRA +━+ 1/1 \d:\d\d:\d\d +score -?\d\.\d{3}.*", bar)
    assert sum(line.startswith("loading tiny: ") for line in seen.lines) == 1
    assert not any("safetensors" in line or "debug" in line for line in seen.lines)
    assert "safetensors" in (again / "frostline.log").read_text()


def test_quiet_shows_no_bar_and_verbose_shows_stages(started: Path, tmp_path: Path) -> None:
    for flag, shown in (("-q", False), ("-v", True)):
        arguments = ["-m", "frostline", "train", flag, "config.yaml", f"output_dir={tmp_path / flag}"]
        seen = on_terminal(*arguments, cwd=started, columns=200)
        assert seen.code == 0, seen.text
        assert ("train the LoRA" in seen.text) is shown
        assert ("debug: step 1: score" in seen.text) is shown
        assert "1 steps. The adapter is in" in seen.text


def test_a_refused_run_leaves_no_log(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(started)
    before = (started / "my" / "run" / "frostline.log").read_bytes()
    with pytest.raises(ConfigError, match="already contains a run"):
        train("config.yaml")
    assert (started / "my" / "run" / "frostline.log").read_bytes() == before


def test_processes_but_the_first_show_errors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from frostline.cli.verbosity import progress, set_verbosity
    from frostline.terminal.logs import console_shows

    monkeypatch.setenv("RANK", "1")
    set_verbosity(verbose=True, quiet=False)
    assert not console_shows(logging.WARNING) and console_shows(logging.ERROR)
    assert progress().console.quiet
    monkeypatch.setenv("RANK", "0")
    set_verbosity(verbose=False, quiet=False)
    assert console_shows(logging.INFO) and not console_shows(logging.DEBUG)
    assert not progress().console.quiet


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.write_text(""), "not a folder"),
        (lambda folder: folder.mkdir(), r"not a run folder \(no metrics.jsonl\)"),
        (
            lambda folder: [folder.mkdir(), (folder / "run.json").write_text("{}")],
            "the run there has not finished its first step",
        ),
    ],
)
def test_no_report_of_what_is_no_run(make: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    make(tmp_path / "it")
    with pytest.raises(DataError, match=f"it: {said}"):
        check_is_run(tmp_path / "it")


def test_the_report_of_no_run_fails_before_anything_large_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from frostline.cli import main
sys.argv = ["frostline", "report", {str(tmp_path)!r}]
try:
    main()
finally:
    print(*({{"matplotlib", "torch", "numpy"}} & {{*sys.modules}}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (1, "")
    assert "error: " in result.stderr and "Traceback" not in result.stderr
