"""Checkpoints: complete or absent, found, verified and rotated; damaged ones are detected and skipped."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from frostline.errors import CheckpointError
from frostline.train.loop.checkpoint import (
    MANIFEST,
    Checkpoint,
    find_checkpoints,
    latest_intact,
    read_state,
    rotate,
    set_aside_after,
    write_checkpoint,
)
from frostline.train.loop.resume import find_resume


def fill(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 1}')
    (folder / "optimizer.safetensors").write_bytes(bytes(range(256)) * 40)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 10, 4):
        write_checkpoint(tmp_path, step, fill)
    return tmp_path


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in find_checkpoints(run)]


def test_a_checkpoint_verifies_and_the_newest_is_found(run: Path) -> None:
    assert steps(run) == [2, 4, 10]
    for checkpoint in find_checkpoints(run):
        checkpoint.verify()
    assert latest_intact(run) == Checkpoint(run / "checkpoint-10", 10)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


DAMAGE = {
    "a flipped bit": lambda path: _flip(path / "optimizer.safetensors"),
    "a shorter file": lambda path: os.truncate(path / "optimizer.safetensors", 100),
    "an empty file": lambda path: os.truncate(path / "state.json", 0),
    "a missing file": lambda path: (path / "optimizer.safetensors").unlink(),
    "a file too many": lambda path: (path / "extra.pkl").touch(),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "a broken manifest": lambda path: os.truncate(path / MANIFEST, 30),
    "a manifest of another kind": lambda path: (path / MANIFEST).write_text("[]"),
    "another format": lambda path: (path / MANIFEST).write_text(json.dumps({"format": 9, "files": {}})),
    "a folder for a file": lambda path: _swap_for_folder(path / "state.json"),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _swap_for_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_and_the_one_before_is_taken(kind: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    DAMAGE[kind](run / "checkpoint-10")
    with pytest.raises(CheckpointError, match="checkpoint-10"):
        find_resume(run, str(run / "checkpoint-10"))
    with caplog.at_level(logging.WARNING):
        assert find_resume(run, "latest") == Checkpoint(run / "checkpoint-4", 4)
    assert "checkpoint-10" in caplog.text
    assert "using the checkpoint before it" in caplog.text
    # The skipped checkpoint is kept under another name, so a new checkpoint 10 can be written.
    set_aside_after(run, 4)
    assert steps(run) == [2, 4]
    assert len(list(run.glob("set-aside-checkpoint-10-*"))) == 1
    write_checkpoint(run, 10, fill).verify()


def test_without_an_intact_one_nothing_is_begun_anew(run: Path) -> None:
    for step in steps(run):
        _flip(run / f"checkpoint-{step}" / "state.json")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        find_resume(run, "latest")


def test_what_resume_may_name(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert find_resume(run, None) is None
    assert find_resume(run, str(run / "checkpoint-2")) == Checkpoint(run / "checkpoint-2", 2)
    assert find_resume(run, "checkpoint-2") == Checkpoint(run / "checkpoint-2", 2)
    assert find_resume(run, str(run)) == Checkpoint(run / "checkpoint-10", 10)
    bare = tmp_path_factory.mktemp("bare")
    assert find_resume(bare, "latest") is None
    with pytest.raises(CheckpointError, match="is not a checkpoint and contains none"):
        find_resume(run, str(bare))
    with pytest.raises(CheckpointError, match="no such folder"):
        find_resume(run, str(bare / "gone"))


def test_rotation_keeps_the_newest_and_clears_debris(run: Path) -> None:
    debris = run / ".checkpoint-12.0123abcd.partial"
    shutil.copytree(run / "checkpoint-2", debris)
    rotate(run, None)
    assert not debris.exists()
    assert steps(run) == [2, 4, 10]
    rotate(run, 2)
    assert steps(run) == [4, 10]


def test_what_cannot_be_written_leaves_what_was(run: Path) -> None:
    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(28, os.strerror(28))

    with pytest.raises(CheckpointError, match=r"checkpoint-12 cannot be written: No space left.*checkpoint-10"):
        write_checkpoint(run, 12, full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(run, 10, full)
    assert steps(run) == [2, 4, 10]
    latest = latest_intact(run)
    assert latest is not None
    assert latest.step == 10
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


class Killed(BaseException):
    """An exception that stops everything after it, like a kill."""


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_checkpoint_that_is_replaced_is_there_until_the_new_one_is(
    moment: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill before the old checkpoint is moved, between both renames, and after them."""
    rename, left = os.rename, iter(range(moment))

    def dying(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise Killed
        rename(source, target)

    def refill(folder: Path) -> None:
        fill(folder)
        (folder / "state.json").write_text('{"step": 10}')

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
        patch.setattr(shutil, "rmtree", lambda path, **options: None)
        if moment < 2:
            with pytest.raises(Killed):
                write_checkpoint(run, 10, refill)
        else:
            write_checkpoint(run, 10, refill)
    found = latest_intact(run)
    assert found is not None
    assert found.step == 10
    assert steps(run) == [2, 4, 10]
    assert read_state(found) == {"step": 1 if moment < 2 else 10}
    # A resumed run may set the checkpoint aside, or keep it under its own name.
    rotate(run, None)
    assert latest_intact(run) == Checkpoint(run / "checkpoint-10", 10)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    set_aside_after(run, 4)
    assert steps(run) == [2, 4]


def test_a_checkpoint_that_cannot_be_renamed_leaves_the_one_of_its_step(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def refusing(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(28, os.strerror(28))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refusing)
        with pytest.raises(CheckpointError, match=r"No space left.*the last complete checkpoint is .*/checkpoint-10"):
            write_checkpoint(run, 10, fill)
    assert latest_intact(run) == Checkpoint(run / "checkpoint-10", 10)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_a_manifest_that_is_hostile_is_damage(run: Path) -> None:
    manifest = run / "checkpoint-10" / MANIFEST
    for text in ("[" * 100_000, '{"format": 1, "files": {"../secret": {"bytes": 1, "sha256": ""}}}', "1" * 5000):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match="checkpoint-10 is damaged"):
            Checkpoint(run / "checkpoint-10", 10).verify()
