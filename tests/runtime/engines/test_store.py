"""The engine store: build, find, update, trust, remove and prune engines; full disks."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from frostline.errors import EngineError
from frostline.runtime.engines.manifest import EngineId, Manifest
from frostline.runtime.engines.store import EngineStore, VerifiedEngine, engine_key, runtime_cache_path

ENGINE = EngineId("tiny", "vae_encoder", "onnxruntime", "0123456789abcdef")

BuildEngine = Callable[..., VerifiedEngine]


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.exists() else set()


def test_the_engine_key_depends_on_every_part() -> None:
    parts: dict[str, Any] = {
        "weights_sha256": "0" * 64,
        "computation": "1" * 64,
        "graph": "graph",
        "shapes": {"x": [1, 2]},
        "precision": "fp32",
        "backend": "onnxruntime",
        "backend_version": "1.24",
        "device": "cpu",
        "extra": {"opset": 20},
    }
    keys = {engine_key(**parts)} | {engine_key(**{**parts, name: {"other": 1}}) for name in parts}
    assert len(keys) == 1 + len(parts)
    assert all(len(key) == 16 for key in keys)
    assert engine_key(**{**parts, "shapes": {"x": (1, 2)}}) == engine_key(**parts)


def test_a_built_engine_is_found_and_verifies(store: EngineStore, build: BuildEngine) -> None:
    built = build()
    record = store.get(ENGINE)
    assert record is not None
    assert record.path == ENGINE.path(store.root) == built.path
    assert record.problem is None
    assert store.find("tiny", "vae_encoder") == store.find("tiny", "vae_encoder", "onnxruntime") == [record]
    verified = store.verify(record)
    assert verified == built
    assert verified.onnx("model.onnx") == built.path / "model.onnx", "its weights are in another file"
    assert verified.read("model.onnx.data") == (built.path / "model.onnx.data").read_bytes()
    assert names(built.path.parent) == {built.path.name, f".{built.path.name}.lock"}
    with pytest.raises(EngineError, match=r"no file other\.onnx"):
        verified.onnx("other.onnx")


def test_find_filters_and_sorts(store: EngineStore, build: BuildEngine) -> None:
    build(backend="tensorrt-rtx")
    build()
    build(stage="denoiser")
    assert [record.id.backend for record in store.find("tiny", "vae_encoder")] == ["onnxruntime", "tensorrt-rtx"]
    assert [record.id.stage for record in store.find()] == ["denoiser", "vae_encoder", "vae_encoder"]
    assert store.find("tiny", "vae_decoder") == store.find("other") == []


def test_a_missing_root_is_an_empty_store(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "nowhere")
    assert store.find() == store.prune(max_bytes=0) == []
    assert store.get(ENGINE) is None
    assert not store.root.exists()


def test_recipes_and_strangers_beside_engines_are_no_engines(store: EngineStore, build: BuildEngine) -> None:
    build()
    (store.root / "tiny.yaml").touch()
    (store.root / "tiny" / "README-1").touch()
    (store.root / "tiny" / "vae_encoder" / "notes-1").touch()
    assert len(store.find()) == 1


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"signature": "x"}', b"[" * 100_000, b"\xff"])
def test_a_damaged_manifest_is_listed_with_its_problem(
    store: EngineStore, build: BuildEngine, content: bytes | None
) -> None:
    path = build().path / "manifest.json"
    path.unlink() if content is None else path.write_bytes(content)
    (record,) = store.find("tiny", "vae_encoder")
    assert record.manifest is None
    assert "manifest.json" in str(record.problem)
    with pytest.raises(EngineError, match=r"manifest\.json.*--force"):
        store.verify(record)


def test_the_second_builder_finds_the_engine_of_the_first(store: EngineStore, build: BuildEngine) -> None:
    built = build()
    with store.building(ENGINE) as building:
        assert building.existing == built


def test_a_damaged_engine_is_reported_and_replaced(
    store: EngineStore, build: BuildEngine, caplog: pytest.LogCaptureFixture
) -> None:
    built = build()
    (built.path / "model.onnx").write_bytes(b"damage")
    with store.building(ENGINE) as building:
        assert building.existing is None
    assert "model.onnx has 6 bytes" in caplog.text
    assert build().read("model.onnx") != b"damage"
    assert names(built.path.parent) == {built.path.name, f".{built.path.name}.lock"}


def test_leaving_without_commit_leaves_nothing(store: EngineStore) -> None:
    with store.building(ENGINE) as building:
        (building.folder / "model.onnx").touch()
    with pytest.raises(RuntimeError, match="tracer"), store.building(ENGINE) as building:
        (building.folder / "model.onnx").touch()
        raise RuntimeError("the tracer failed")
    assert store.find() == []
    assert names(store.root / "tiny" / "vae_encoder") == {".onnxruntime-0123456789abcdef.lock"}


def test_commit_refuses_what_would_not_verify(
    store: EngineStore, build: BuildEngine, manifest: Manifest, add_onnx: Callable[..., bytes]
) -> None:
    with store.building(ENGINE) as building:
        with pytest.raises(EngineError, match="has no files"):
            building.commit(manifest)
        with pytest.raises(EngineError, match="describes"):
            building.commit(manifest.updated(stage="denoiser"))
        (building.folder / "other.onnx").write_bytes(add_onnx("other.onnx"))
        with pytest.raises(EngineError, match=r"needs the file model\.onnx"):
            building.commit(manifest)
        (building.folder / "model.onnx").symlink_to("other.onnx")
        with pytest.raises(EngineError, match="not a regular file"):
            building.commit(manifest)
        (building.folder / "model.onnx").unlink()
        (building.folder / "manifest.json").touch()
        with pytest.raises(EngineError, match="is not a valid name"):
            building.commit(manifest)
    with pytest.raises(EngineError, match="outside the engine folder"):
        build(add_onnx("../model.onnx.data"))
    assert store.find() == []


@pytest.mark.parametrize("unsafe", [{"model": "../x"}, {"backend": "a/b"}, {"key": ".."}, {"key": "a-b"}])
def test_unsafe_words_name_no_engine(unsafe: dict[str, str]) -> None:
    with pytest.raises(EngineError, match="is not a valid folder name"):
        replace(ENGINE, **unsafe)


def test_measurements_can_be_updated(store: EngineStore, build: BuildEngine) -> None:
    built = build()
    updated = store.update(built, built.manifest.updated(verified=True, latency_ms={"onnxruntime": 0.5}))
    record = store.get(ENGINE)
    assert record is not None
    assert store.verify(record) == updated
    assert updated.manifest.verified
    assert names(built.path) == {"manifest.json", "model.onnx", "model.onnx.data"}
    with pytest.raises(EngineError, match="rebuilt in the meantime"):
        store.update(built, built.manifest.updated(artifacts={}))


def test_trust_signs_an_engine_made_elsewhere(store: EngineStore, build: BuildEngine, signing_key: Path) -> None:
    path = build().path
    signing_key.unlink()
    record = store.get(ENGINE)
    assert record is not None
    with pytest.raises(EngineError, match=f"frostline engines trust {path}"):
        store.verify(record)
    trusted = store.trust(path)
    assert store.verify(record) == trusted


def test_trust_needs_hashes_that_hold(store: EngineStore, build: BuildEngine, tmp_path: Path) -> None:
    path = build().path
    shutil.copytree(path, tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="not in the engine store"):
        store.trust(tmp_path / "elsewhere")
    assert EngineStore.of_engine(path).root == store.root
    for nowhere in (tmp_path / "elsewhere", path.with_name("onnxruntime-other"), Path("/tmp"), Path("/")):
        with pytest.raises(EngineError, match="is not an engine"):
            EngineStore.of_engine(nowhere)
    (path / "model.onnx.data").write_bytes(b"four")
    with pytest.raises(EngineError, match=r"hash of model\.onnx\.data differs"):
        store.trust(path)


def test_remove_is_complete_and_can_be_repeated(store: EngineStore, build: BuildEngine) -> None:
    build()
    (record,) = store.find()
    store.remove(record)
    store.remove(record)
    assert store.find() == []
    assert names(record.path.parent) == {f".{record.path.name}.lock"}
    with pytest.raises(EngineError, match="no such folder"):
        store.verify(record)


def test_runtime_caches_are_part_of_their_engine(store: EngineStore, build: BuildEngine) -> None:
    path = build().path
    other = build(key="other").path
    (record,) = [each for each in store.find() if each.path == path]
    size = record.bytes
    for engine in (path, other):
        runtime_cache_path(engine, "model.onnx").write_bytes(b"kernels")
    assert record.bytes == size + len(b"kernels")
    store.remove(record)
    assert names(path.parent) == {
        other.name,
        *(f".{name}" for name in (f"{path.name}.lock", f"{other.name}.lock")),
        (runtime_cache_path(other, "model.onnx").name),
    }
    build(key="other")
    assert not runtime_cache_path(other, "model.onnx").exists(), "it was compiled from the engine before"


def test_prune_removes_the_oldest(store: EngineStore, build: BuildEngine) -> None:
    now = datetime.now(UTC)
    for days in (1, 3, 5, 7):
        build(key=f"day{days}", created=now - timedelta(days=days))
    size = store.find()[0].bytes
    assert [record.id.key for record in store.prune(older_than=timedelta(days=6))] == ["day7"]
    assert [record.id.key for record in store.prune(max_bytes=2 * size + 10)] == ["day5"]
    assert [record.id.key for record in store.find()] == ["day1", "day3"]
    assert store.prune() == []


def test_prune_sweeps_the_debris_of_dead_builders_only(store: EngineStore, build: BuildEngine) -> None:
    build()
    debris = ENGINE.path(store.root).with_name(".onnxruntime-dead.building")
    debris.mkdir()
    with store.building(ENGINE) as building:
        store.prune()
        assert building.folder.exists()
    assert not debris.exists()
    assert len(store.find()) == 1


def test_a_root_that_cannot_be_written_can_be_read(
    store: EngineStore, build: BuildEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr("frostline.runtime.engines.store.FileLock.acquire", refuse)
    (record,) = store.find()
    assert store.verify(record) == built
    with pytest.raises(EngineError, match="cannot lock"), store.building(ENGINE):
        pass
    with pytest.raises(EngineError, match="cannot lock"):
        store.remove(record)


def test_a_folder_that_vanishes_while_listed_is_no_engine(
    store: EngineStore, build: BuildEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()

    def vanish(path: Path) -> Manifest:
        shutil.rmtree(path)
        raise EngineError("gone")

    monkeypatch.setattr("frostline.runtime.engines.store.peek", vanish)
    assert store.find() == []


def test_a_full_disk_in_the_builder_is_a_clear_error(store: EngineStore) -> None:
    with pytest.raises(EngineError, match="disk is full"), store.building(ENGINE) as building:
        (building.folder / "model.onnx").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(store.root / "tiny" / "vae_encoder") == {".onnxruntime-0123456789abcdef.lock"}


@pytest.mark.parametrize("call", range(5))
def test_a_full_disk_at_any_sync_leaves_no_half_engine(
    store: EngineStore, build: BuildEngine, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    build(key="other")  # creates the signing key
    real, calls = os.fsync, iter(range(10))

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch, pytest.raises(EngineError, match="disk is full"):
        patch.setattr(os, "fsync", full)
        build()
    for record in store.find():
        store.verify(record)
    build()
    assert len(store.find()) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, manifest: Manifest) -> None:
    store = EngineStore(small_disk)
    with pytest.raises(EngineError, match="disk is full"), store.building(ENGINE) as building:
        (building.folder / "model.plan").write_bytes(bytes(2**20))
    assert store.find() == []
    with store.building(ENGINE) as building:
        (building.folder / "model.plan").write_bytes(bytes(2**16))
        building.commit(manifest.updated(networks=()))
    assert [store.verify(record).path for record in store.find()] == [ENGINE.path(store.root)]
