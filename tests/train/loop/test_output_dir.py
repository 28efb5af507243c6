"""The run folder: which files are deleted for a new run, and that a refused run changes nothing in it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from folders import content
from steps import QUICK, Clips

from frostline.errors import CheckpointError, ConfigError, FrostlineError
from frostline.train.loop.checkpoint import MANIFEST, find_checkpoints
from frostline.train.loop.output_dir import began_from, check_start, check_writable, clear_run, is_run
from frostline.train.loop.resume import find_resume
from frostline.train.loop.run_dir import claimed
from frostline.train.loop.trainer import RunOptions, train
from frostline.train.loop.validation import Validation, validate
from frostline.train.report.page import write_report
from frostline.train.settings import TrainerSettings

SHARPNESS = {"type": "sharpness", "baseline": 0.0, "scale": 1.0}
SETTINGS: dict[str, Any] = {**QUICK, "rewards": [SHARPNESS]}
# Not part of the run itself: the lock, and the cache, which any run may use.
STAYS = {".lock", "cache"}


class Killed(BaseException):
    """An exception that ends a run like a kill: the run cannot catch it."""


def run(module: Any, out: Path, **options: Any) -> Any:
    """Train three steps, with everything that a run can write."""
    starts = Validation(Clips(count=1, seed=11), [0], lossless=True)
    settings = {"learning_rate": 1e-3, "max_train_steps": 3, "checkpointing_steps": 1, "save_total_limit": 2}
    given = {"config": {"lora": {"rank": 8}}, "validate": lambda step: validate(module, starts, step, out), **options}
    return train(
        module,
        Clips(count=2, seed=11),
        TrainerSettings.parse({**settings, "report_to": "tensorboard"}),
        out,
        RunOptions(**given, validation_steps=2),
    )


@pytest.fixture(scope="module")
def whole(make_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with its report."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(make_module(**SETTINGS), out)
    write_report(out)
    return out


@pytest.fixture
def ended(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of `whole` that the test may change."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_all_that_a_run_writes_is_deleted_and_nothing_else(ended: Path) -> None:
    places = ("", "adapter", "validation", "validation/truth", "validation/step-000002", "cache")
    for place in places:
        (ended / place).mkdir(exist_ok=True)
        (ended / place / "notes.txt").write_text("mine")
    shutil.copytree(ended / "checkpoint-2", ended / "set-aside-checkpoint-2-01234567")
    # Files that a killed run leaves.
    shutil.copytree(ended / "checkpoint-2", ended / ".checkpoint-3.01234567.partial")
    shutil.copytree(ended / "checkpoint-2", ended / ".checkpoint-3.01234567.replaced")
    for part in (".metrics.jsonl.01234567.part", ".run.json.01234567.part", "validation/truth/.0.mp4.01234567.part"):
        (ended / part).write_text("a piece")
    check_start(ended, overwrite=True)
    clear_run(ended)
    left = {path for path in content(ended) if path not in STAYS}
    copied = {f"set-aside-checkpoint-2-01234567/{name}" for name in content(ended / "set-aside-checkpoint-2-01234567")}
    notes = {str(Path(place, "notes.txt")) for place in places}
    assert left == notes | copied | {*places[1:], "set-aside-checkpoint-2-01234567"} - STAYS
    assert not is_run(ended)
    check_start(ended.parent / "new")


def test_an_overwritten_run_leaves_no_more_than_a_new_one(ended: Path, whole: Path, make_module: Any) -> None:
    (ended / "validation" / "step-000777.csv").write_text("of before")
    run(make_module(**SETTINGS), ended, overwrite=True)
    write_report(ended)
    # The trackers name their files by time and process.
    kept = [{name for name in content(out) if not name.startswith("trackers/")} for out in (ended, whole)]
    assert kept[0] == kept[1]
    assert [json.loads(line)["step"] for line in (ended / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert len(list((ended / "trackers" / "frostline").glob("events.*"))) == 1


FOREIGN: dict[str, Callable[[Path], None]] = {
    "config.yaml": lambda folder: (folder / "config.yaml").write_text("mine: true"),
    "validation": lambda folder: (folder / "validation" / "clips").mkdir(parents=True),
    "adapter": lambda folder: shutil.copytree(folder.parent / "run" / "adapter", folder / "adapter"),
    "checkpoint-500": lambda folder: (folder / "checkpoint-500").mkdir(),
    "report.html": lambda folder: (folder / "report.html").symlink_to(folder.parent / "run" / "report.html"),
    "run.json": lambda folder: (folder / "run.json").write_text('{"version": 1}'),
    "metrics.jsonl": lambda folder: (folder / "metrics.jsonl").write_text("{}\n"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"restart": True}], ids=["new", "overwrite", "restart"])
def test_what_no_run_wrote_is_neither_deleted_nor_replaced(
    name: str, options: dict[str, Any], ended: Path, make_module: Any
) -> None:
    folder = ended.parent / "mine"
    folder.mkdir()
    FOREIGN[name](folder)
    before = content(folder)
    with pytest.raises(ConfigError, match=f"mine already contains {name}, but no run of frostline"):
        check_start(folder, **options)
    if options and name == "config.yaml":
        with pytest.raises(ConfigError, match="but no run of frostline"):
            run(make_module(**SETTINGS), folder, **options)
    assert content(folder) == before


def test_a_checkpoint_with_files_of_others_is_not_deleted(ended: Path) -> None:
    (ended / "checkpoint-2" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt was not written by a run"):
        check_start(ended, overwrite=True)
    (ended / "checkpoint-2" / "notes.txt").unlink()
    elsewhere = ended.parent / "elsewhere"
    (ended / "checkpoint-2").rename(elsewhere)
    (ended / "checkpoint-2").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="checkpoint-2 was not written by a run"):
        check_start(ended, overwrite=True)


def test_links_are_not_followed(ended: Path) -> None:
    clips = ended.parent / "clips"
    (ended / "validation").rename(clips)
    (ended / "validation").symlink_to(clips)
    metrics = ended.parent / "metrics.jsonl"
    (ended / "metrics.jsonl").rename(metrics)
    (ended / "metrics.jsonl").symlink_to(metrics)
    before = content(clips)
    clear_run(ended)
    assert content(clips) == before
    assert metrics.exists() and not (ended / "metrics.jsonl").is_symlink()


def test_a_folder_that_cannot_be_written_to_is_named_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = content(tmp_path)
    for folder in (tmp_path / "file" / "run", Path("/proc/run/deep"), Path("/proc")):
        with pytest.raises(CheckpointError, match=f"^{folder}: cannot be written to: "):
            check_writable(folder)
    time = tmp_path.stat().st_mtime_ns
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "deep")
    assert content(tmp_path) == before
    assert tmp_path.stat().st_mtime_ns == time


# Killed before the first step, or after a step without a checkpoint.
@pytest.mark.parametrize("moment", ["validation", "step 1", "step 2"])
def test_a_run_killed_before_its_first_checkpoint_is_begun_anew(moment: str, make_module: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def die(value: Any) -> Any:
        if moment == "validation" or (isinstance(value, dict) and moment == f"step {value['step']}"):
            raise Killed
        return {"psnr": 1.0}

    settings = TrainerSettings(learning_rate=1e-3, max_train_steps=3, checkpointing_steps=50)
    options: dict[str, Any] = {"validate": die, "validation_steps": 50, "on_step": die}
    for attempt in range(2):
        checkpoint = find_resume(out, "latest")
        with pytest.raises(Killed):
            train(
                make_module(**SETTINGS),
                Clips(count=2),
                settings,
                out,
                RunOptions(resume=checkpoint, restart=True, **options),
            )
        assert not find_checkpoints(out), attempt
    with pytest.raises(ConfigError, match="already contains a run"):
        train(make_module(**SETTINGS), Clips(count=2), settings, out)
    (out / "notes.txt").write_text("mine")
    outcome = train(make_module(**SETTINGS), Clips(count=2), settings, out, RunOptions(restart=True))
    assert outcome.step == 3
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert not (out / "validation.jsonl").exists()
    assert (out / "notes.txt").read_text() == "mine"


def test_a_run_that_began_elsewhere_is_begun_anew_from_there(ended: Path, make_module: Any) -> None:
    out, settings = ended.parent / "out", TrainerSettings(learning_rate=1e-3, max_train_steps=5, checkpointing_steps=50)
    start = find_resume(out, str(ended / "checkpoint-3"))

    def die(line: Any) -> None:
        raise Killed

    for options in ({}, {"restart": True}):
        with pytest.raises(Killed):
            train(make_module(**SETTINGS), Clips(count=2), settings, out, RunOptions(start, on_step=die, **options))
    # Starting at step 0 is not what the first command requested.
    with pytest.raises(ConfigError, match=r"a run that started from .*checkpoint-3, and has no checkpoint yet"):
        train(make_module(**SETTINGS), Clips(count=2), settings, out, RunOptions(restart=True))
    outcome = train(make_module(**SETTINGS), Clips(count=2), settings, out, RunOptions(start, restart=True))
    assert outcome.step == 5
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert began_from(out) == str(ended / "checkpoint-3")
    # The run is resumed from its own checkpoint, and still records where it started.
    train(make_module(**SETTINGS), Clips(count=2), settings, out, RunOptions(find_resume(out, "latest")))
    assert began_from(out) == str(ended / "checkpoint-3")


def test_a_run_with_a_checkpoint_is_not_begun_anew(ended: Path, make_module: Any) -> None:
    """Another process may have written the checkpoint after `latest` was looked up."""
    before = content(ended)
    with pytest.raises(ConfigError, match="already contains a run"):
        run(make_module(**SETTINGS), ended, restart=True)
    assert content(ended) == before


def test_a_deletion_that_is_interrupted_can_be_done_again(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the deletion at several files: the rest contains no checkpoint, and is still marked as a run."""
    total = sum(path.is_file() for path in ended.rglob("*"))
    unlink, begun = os.unlink, ended.parent / "begun"
    for number in range(0, total, 3):
        shutil.copytree(ended, begun)
        left = iter(range(number))

        def dying(path: Any, left: Any = left, **options: Any) -> None:
            if next(left, None) is None:
                raise Killed
            unlink(path, **options)

        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(os, "unlink", dying)
            clear_run(begun)
        assert find_checkpoints(begun) == []
        check_start(begun, restart=True)
        clear_run(begun)
        check_start(begun)
        shutil.rmtree(begun)


def _state(out: Path, **changes: Any) -> None:
    """Change `state.json`, and update its hash in the manifest."""
    path = out / "checkpoint-3" / "state.json"
    state = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in state.items() if value is not None}))
    manifest = out / "checkpoint-3" / MANIFEST
    sealed = json.loads(manifest.read_text())
    sealed["files"]["state.json"] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(sealed))


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Path], Any], str]] = {
    "another rank": ({"lora": {"rank": 4}}, lambda out: None, "has rank 8, not 4"),
    "another scale": ({"lora": {"rank": 8, "alpha": 4.0}}, lambda out: None, r"scale \(alpha / rank\) of 1, not 0.5"),
    "other layers": ({"lora": {"rank": 8, "target_modules": ["q", "k"]}}, lambda out: None, "does not match the model"),
    "renamed": ({}, lambda out: _state(out, step=2), "its state belongs to step 2: was it renamed"),
    "a step that is missing": ({}, lambda out: _state(out, samples=None), "'samples' is missing"),
    "no kind of checkpointing": (
        {"gradient_checkpointing": "auto"},
        lambda out: _state(out, gradient_checkpointing="some"),
        "cannot be restored",
    ),
    "processes whose numbers are missing": ({}, lambda out: _state(out, processes=None), "'processes' is missing"),
    "taken": ({}, lambda out: None, "another run is writing to it"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refused_resume_leaves_the_folder_as_it_was(reason: str, ended: Path, make_module: Any) -> None:
    changes, prepare, said = REFUSED[reason]
    # Files that resuming would set aside, shorten or delete.
    shutil.copytree(ended / "checkpoint-3", ended / "checkpoint-9")
    shutil.copytree(ended / "checkpoint-2", ended / ".checkpoint-4.01234567.partial")
    for name in ("metrics.jsonl", "validation.jsonl"):
        with (ended / name).open("a") as file:
            file.write('{"step": 4}\n{"step"')
    prepare(ended)
    module = make_module(**{**SETTINGS, **changes})
    checkpoint = next(found for found in find_checkpoints(ended) if found.step == 3)
    checkpoint.verify()
    before = content(ended)
    with claimed(ended) if reason == "taken" else nullcontext(), pytest.raises(FrostlineError, match=said):
        run(module, ended, resume=checkpoint, config={"lora": {"rank": 4}})
    assert content(ended) == before


def test_a_tracker_that_cannot_be_started_is_called_so_and_nothing_is_touched(
    ended: Path, make_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError("not logged in")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    before = content(ended)
    with pytest.raises(ConfigError, match=r"^train\.report_to: tensorboard cannot be started: not logged in"):
        run(make_module(**SETTINGS), ended, resume=find_checkpoints(ended)[0])
    assert content(ended) == before
