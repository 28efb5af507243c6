"""The signing key is created once, is private, and is refused otherwise."""

import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from frostline.errors import EngineError
from frostline.runtime.engines import signing

fork = multiprocessing.get_context("fork")


def test_a_signature_holds_for_its_own_data_only() -> None:
    signature = signing.sign(b"engine")
    assert len(signature) == 64
    assert signing.verify(b"engine", signature)
    assert not signing.verify(b"Engine", signature)
    assert not signing.verify(b"engine", signature.upper() + "0")
    assert not signing.verify(b"engine", "ä")
    assert not signing.verify(b"engine", "\ud800")


def test_the_key_is_made_once_private_and_alone(signing_key: Path) -> None:
    signature = signing.sign(b"x")
    key = signing_key.read_bytes()
    assert len(key) == 32
    assert stat.S_IMODE(signing_key.stat().st_mode) == 0o600
    assert signing.sign(b"x") == signature
    assert signing_key.read_bytes() == key
    assert list(signing_key.parent.iterdir()) == [signing_key]


def test_another_key_signs_differently(signing_key: Path) -> None:
    signature = signing.sign(b"x")
    signing_key.unlink()
    assert not signing.verify(b"x", signature)


@pytest.mark.fresh_process
def test_processes_that_race_for_the_first_key_agree() -> None:
    barrier, results = fork.Barrier(8), fork.SimpleQueue()

    def race() -> None:
        barrier.wait()
        results.put(signing.sign(b"x"))

    processes = [fork.Process(target=race) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert {results.get() for _ in processes} == {signing.sign(b"x")}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o620])
def test_a_key_open_to_others_is_refused(signing_key: Path, mode: int) -> None:
    signing.sign(b"x")
    signing_key.chmod(mode)
    with pytest.raises(EngineError, match=f"chmod 600 {signing_key}"):
        signing.sign(b"x")


@pytest.mark.parametrize("key", [b"", b"short", b"x" * 31])
def test_a_short_key_is_refused(signing_key: Path, key: bytes) -> None:
    signing.sign(b"x")
    signing_key.write_bytes(key)
    with pytest.raises(EngineError, match=f"has {len(key)} bytes"):
        signing.verify(b"x", "0" * 64)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_is_refused(signing_key: Path) -> None:
    signing.sign(b"x")
    os.chown(signing_key, 12345, -1)
    with pytest.raises(EngineError, match="another user"):
        signing.sign(b"x")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FROSTLINE_SIGNING_KEY_FILE", str(tmp_path / "file" / "signing.key"))
    with pytest.raises(EngineError, match="FROSTLINE_SIGNING_KEY_FILE"):
        signing.sign(b"x")


def test_the_key_lies_in_the_users_configuration_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FROSTLINE_SIGNING_KEY_FILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert signing.key_path() == tmp_path / "frostline" / "signing.key"
