"""An engine that was changed on disk is refused before anything is deserialised, with a helpful message."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from frostline.errors import EngineError, SharedFolderError
from frostline.runtime.engines.manifest import EngineId, Manifest
from frostline.runtime.engines.store import EngineStore, VerifiedEngine

ENGINE = EngineId("tiny", "vae_encoder", "onnxruntime", "0123456789abcdef")

BuildEngine = Callable[..., VerifiedEngine]


def refusal(store: EngineStore, engine: EngineId = ENGINE) -> str:
    record = store.get(engine)
    assert record is not None
    with pytest.raises(EngineError) as refused:
        store.verify(record)
    assert str(record.path.parent.parent) in str(refused.value)
    assert "frostline export MODEL --stages vae_encoder --backend onnxruntime --force" in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "manifest.json"])
def test_every_flipped_byte_is_noticed(store: EngineStore, build: BuildEngine, name: str) -> None:
    file = build().path / name
    original = file.read_bytes()
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        assert name in refusal(store), position


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "manifest.json"])
def test_truncated_grown_and_missing_files_are_noticed(store: EngineStore, build: BuildEngine, name: str) -> None:
    file = build().path / name
    original = file.read_bytes()
    for content in (original[:-1], b"", original + b"\n"):
        file.write_bytes(content)
        assert name in refusal(store)
    file.unlink()
    assert f"{name} is missing" in refusal(store)


def test_a_manifest_edited_by_hand_is_refused(store: EngineStore, build: BuildEngine) -> None:
    file = build().path / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b'"verified": false', b'"verified": true'))
    assert "the signature in manifest.json is invalid" in refusal(store)


def test_an_oversized_manifest_is_refused_unparsed(store: EngineStore, build: BuildEngine) -> None:
    file = build().path / "manifest.json"
    file.write_bytes(b" " * (17 * 2**20))
    assert "larger than" in refusal(store)


def test_another_key_is_refused_and_trust_is_offered(store: EngineStore, build: BuildEngine, signing_key: Path) -> None:
    path = build().path
    signing_key.unlink()
    message = refusal(store)
    assert "signed with another key" in message
    assert f"frostline engines trust {path}" in message


def test_a_bad_key_file_is_named_and_not_the_engine(store: EngineStore, build: BuildEngine, signing_key: Path) -> None:
    build()
    signing_key.chmod(0o644)
    with pytest.raises(EngineError, match="chmod 600") as refused:
        store.verify(store.find()[0])
    assert "--force" not in str(refused.value)


def test_an_engine_under_another_name_is_refused(store: EngineStore, build: BuildEngine) -> None:
    path = build().path
    shutil.copytree(path, path.with_name("onnxruntime-other"))
    assert "describes another engine, tiny/vae_encoder/onnxruntime-0123" in refusal(store, replace(ENGINE, key="other"))


def test_files_of_another_engine_are_refused(
    store: EngineStore, build: BuildEngine, add_onnx: Callable[..., bytes]
) -> None:
    path = build().path
    other = build(add_onnx(in_subgraph=True), key="other").path
    shutil.copy(other / "model.onnx", path / "model.onnx")
    assert "model.onnx has" in refusal(store)


def test_an_extra_file_is_refused(store: EngineStore, build: BuildEngine) -> None:
    (build().path / "libextra.so").touch()
    assert "libextra.so is not part of the engine" in refusal(store)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "manifest.json"])
def test_a_symlinked_file_is_refused(store: EngineStore, build: BuildEngine, tmp_path: Path, name: str) -> None:
    file = build().path / name
    file.rename(tmp_path / name)
    file.symlink_to(tmp_path / name)
    assert f"{name} is a symlink" in refusal(store)


@pytest.mark.parametrize("up", range(3))
def test_a_symlinked_folder_is_refused(store: EngineStore, build: BuildEngine, tmp_path: Path, up: int) -> None:
    path = build().path
    folder = (path, *path.parents)[up]
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    assert f"{folder} is a symlink" in refusal(store)
    if up:
        with pytest.raises(EngineError, match="is a symlink"), store.building(ENGINE):
            pass
        assert store.find() == []
    else:
        assert "is a symlink" in str(store.find()[0].problem)
        store.remove(store.find()[0])
        assert (tmp_path / "outside" / "model.onnx").exists()


def test_a_store_may_itself_lie_behind_a_symlink(build: BuildEngine, store: EngineStore, tmp_path: Path) -> None:
    build()
    (tmp_path / "link").symlink_to(store.root)
    linked = EngineStore(tmp_path / "link")
    (record,) = linked.find()
    assert linked.verify(record).path == tmp_path / "link" / "tiny" / "vae_encoder" / record.path.name


def test_a_pipe_is_refused_without_waiting(store: EngineStore, build: BuildEngine) -> None:
    file = build().path / "model.onnx.data"
    file.unlink()
    os.mkfifo(file)
    assert "not a regular file" in refusal(store)


@pytest.mark.parametrize("in_subgraph", [False, True])
@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("../x.data", "outside the engine folder"),
        ("/etc/passwd", "outside the engine folder"),
        ("sub/../../x.data", "outside the engine folder"),
        ("x.data", "missing"),
        ("", "missing"),
    ],
)
def test_external_data_stays_in_the_folder(
    store: EngineStore,
    build: BuildEngine,
    add_onnx: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    location: str,
    problem: str,
    in_subgraph: bool,
) -> None:
    with monkeypatch.context() as patch:  # a builder without the check, with a trusted key
        patch.setattr("frostline.runtime.engines.store.check_external_data", lambda *_: None)
        build(add_onnx(location, in_subgraph=in_subgraph))
    message = refusal(store)
    assert problem in message
    assert repr(location) in message
    with pytest.raises(EngineError, match=problem):
        store.trust(ENGINE.path(store.root))


def test_a_signed_file_that_is_no_onnx_model_is_refused(build: BuildEngine) -> None:
    with pytest.raises(EngineError, match=r"model\.onnx is not an ONNX model"):
        build(b"\xff\xff\xff")


def one_file(manifest: Manifest, store: EngineStore) -> VerifiedEngine:
    """Return an engine that consists of one graph file."""
    with store.building(manifest.id) as building:
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), building.folder / "model.onnx")
        return building.commit(manifest)


def test_loaders_get_what_was_checked(store: EngineStore, manifest: Manifest, add_onnx: Callable[..., bytes]) -> None:
    engine = one_file(manifest, store)
    content = engine.onnx("model.onnx")
    assert content == (engine.path / "model.onnx").read_bytes()
    (engine.path / "model.onnx").write_bytes(add_onnx())
    with pytest.raises(EngineError, match=r"model\.onnx has"):
        engine.onnx("model.onnx")
    engine.path.chmod(0o777)
    (engine.path / "model.onnx").write_bytes(content)
    assert engine.onnx("model.onnx") == content, (
        "the bytes must be those that were checked, even if others can write there"
    )


@pytest.mark.parametrize("place", ["../../..", "../..", "..", ".", "model.onnx", "model.onnx.data"])
def test_a_path_is_given_out_only_where_nobody_else_can_write(
    store: EngineStore, build: BuildEngine, place: str
) -> None:
    engine = build()
    assert engine.onnx("model.onnx") == engine.path / "model.onnx"
    open_to_all = (engine.path / place).resolve()
    mode = open_to_all.stat().st_mode
    open_to_all.chmod(0o777)
    with pytest.raises(SharedFolderError, match=f"chmod go-w {open_to_all}$"):
        engine.onnx("model.onnx")
    open_to_all.chmod(mode)
    assert engine.onnx("model.onnx") == engine.path / "model.onnx"


def test_engines_are_their_users_alone_without_a_umask(store: EngineStore, build: BuildEngine) -> None:
    before = os.umask(0)
    try:
        engine = build()
    finally:
        os.umask(before)
    assert engine.onnx("model.onnx") == engine.path / "model.onnx"
    written = [path for path in (store.root, *store.root.rglob("*")) if path.suffix != ".lock"]  # lock files are empty
    assert [path for path in written if path.stat().st_mode & 0o022] == []


def test_an_old_signed_manifest_brings_nothing_back(
    store: EngineStore, build: BuildEngine, add_onnx: Callable[..., bytes], tmp_path: Path
) -> None:
    """Refuse it next to the files of a newer build, and in the place of another engine."""
    old = build()
    store.update(old, old.manifest.updated(verified=True))
    shutil.copytree(old.path, tmp_path / "old")
    new = build(add_onnx(in_subgraph=True))
    assert not new.manifest.verified
    shutil.copy(tmp_path / "old" / "manifest.json", new.path)
    assert "model.onnx has" in refusal(store)
    other = replace(ENGINE, key="fedcba9876543210")
    shutil.copytree(tmp_path / "old", other.path(store.root))
    assert "describes another engine" in refusal(store, other)


def test_reading_hashes_again(build: BuildEngine) -> None:
    engine = build()
    (engine.path / "model.onnx.data").write_bytes(b"four")
    with pytest.raises(EngineError, match="hash"):
        engine.read("model.onnx.data")
