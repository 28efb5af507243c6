"""The engine store: built engines on disk, changed atomically, and loaded only after verification.

    root/<model>/<stage>/<backend>-<key>/{model.onnx, …, manifest.json}

Next to each engine folder are hidden files `.<backend>-<key>.<what>`. `lock` serialises all changes to the engine and
is never deleted, because deleting a lock file is a race. `building`, `old` and `manifest` are work in progress; a
process that holds the lock may delete them, because the process that created them has ended. `<file>.runtime_cache`
is what a backend compiled for a file of the engine while it ran; it is deleted with the engine.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from filelock import FileLock, Timeout

from frostline.atomic_io import file_sha256, sync
from frostline.errors import EngineError
from frostline.runtime.engines.disk_errors import disk_errors, full_disk_errors
from frostline.runtime.engines.manifest import NAME, Artifact, EngineId, Manifest, canonical_json
from frostline.runtime.engines.privacy import make_private, make_private_folder
from frostline.runtime.engines.verification import (
    MANIFEST_FILE,
    VerifiedEngine,
    check_external_data,
    check_networks,
    check_no_symlink,
    peek,
    seal,
    verify_engine,
)

__all__ = ["Build", "EngineRecord", "EngineStore", "VerifiedEngine", "engine_key"]

log = logging.getLogger(__name__)

_WORK_IN_PROGRESS = ("building", "old", "manifest")


def engine_key(
    *,
    weights_sha256: str,
    computation: str,
    graph: str,
    shapes: Mapping[str, object],
    precision: str,
    backend: str,
    backend_version: str,
    device: str,
    extra: Mapping[str, object] | None = None,
) -> str:
    """Return the content key of an engine: 16 hexadecimal digits that depend on everything that requires a rebuild."""
    content = {
        "weights_sha256": weights_sha256,
        "computation": computation,
        "graph": graph,
        "shapes": dict(shapes),
        "precision": precision,
        "backend": backend,
        "backend_version": backend_version,
        "device": device,
        "extra": dict(extra or {}),
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()[:16]


@dataclass(frozen=True)
class EngineRecord:
    """An engine in a listing, not verified. `manifest` is None if it is unreadable; `problem` gives the reason."""

    id: EngineId
    path: Path
    manifest: Manifest | None
    problem: str | None = None

    @property
    def created(self) -> datetime:
        """Return when the engine was created; for a damaged engine, when its folder last changed."""
        if self.manifest:
            return self.manifest.created
        status = _status(self.path)
        return datetime.fromtimestamp(status.st_mtime, UTC) if status else datetime.now(UTC)

    @property
    def bytes(self) -> int:
        """Return the disk space of the engine and its runtime caches in bytes."""
        files = (*_entries(self.path), *_runtime_caches(self.path))
        return sum(status.st_size for file in files if (status := _status(file)))


@dataclass(frozen=True)
class Build:
    """An engine being built: write its files to `folder` and call `commit`. `existing`: the finished engine, if any."""

    id: EngineId
    folder: Path
    existing: VerifiedEngine | None
    _store: "EngineStore"

    def commit(self, manifest: Manifest) -> VerifiedEngine:
        """Sign the files in `folder` and move the engine to its path, replacing any previous one.

        Raises:
            EngineError: the manifest is that of another engine, or a file is missing, invalid or cannot be written.
        """
        if manifest.id != self.id:
            raise EngineError(f"the manifest describes {manifest.id}, but {self.id} is being built")
        path = self.id.path(self._store.root)
        with disk_errors(f"cannot store engine {path}"):
            artifacts = {file.name: _seal_artifact(file) for file in sorted(_entries(self.folder))}
            manifest = manifest.updated(artifacts=artifacts)
            if not artifacts:
                raise EngineError(f"engine {path} has no files: write them to the folder of the build")
            check_networks(manifest)
            for file in self.folder.glob("*.onnx"):
                check_external_data(file.name, file.read_bytes(), artifacts)
            _write_synced(self.folder / MANIFEST_FILE, seal(manifest))
            sync(self.folder)
            replaced = _set_aside(path)
            self.folder.rename(path)
            sync(path.parent)
            _remove(replaced)
            _remove_runtime_caches(path)
        return VerifiedEngine(path, manifest)


class EngineStore:
    """All engines below one root folder. Reading needs no lock; a missing root is an empty store."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @classmethod
    def of_engine(cls, path: Path) -> "EngineStore":
        """Return the store that contains the engine folder `path`.

        Raises:
            EngineError: there is no engine at `path`.
        """
        folder = path.resolve()
        if EngineId.of_path(folder) is None or not folder.is_dir():
            raise EngineError(f"{path} is not an engine: give its folder, <engines>/<model>/<stage>/<backend>-<key>")
        return cls(folder.parents[2])

    def find(
        self, model: str | None = None, stage: str | None = None, backend: str | None = None
    ) -> list[EngineRecord]:
        """Return the engines that match all given names, including damaged ones, sorted. Reads manifests only."""
        records = []
        for folder in self._stage_folders():
            if model not in (None, folder.parent.name) or stage not in (None, folder.name):
                continue
            for path in _entries(folder):
                engine = EngineId.of_path(path)
                if engine and backend in (None, engine.backend) and (record := self._record(engine)):
                    records.append(record)
        return sorted(records, key=lambda record: record.id)

    def get(self, engine: EngineId) -> EngineRecord | None:
        """Return one engine, unverified, or None."""
        return self._record(engine)

    def by_key(self, key: str) -> EngineRecord:
        """Return the only engine whose key begins with `key`, unverified.

        Raises:
            EngineError: there is none, or more than one.
        """
        found = [record for record in self.find() if record.id.key.startswith(key)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise EngineError(
                f"no engine in {self.root} has a key that begins with {key!r}: see `frostline engines list`"
            )
        raise EngineError(f"{len(found)} engines have keys that begin with {key!r}: give more digits")

    def verify(self, record: EngineRecord) -> VerifiedEngine:
        """Check signature, key, files and ONNX paths or raise an EngineError. Only the result gives access to files."""
        return verify_engine(self.root, record.id)

    @contextmanager
    def building(self, engine: EngineId) -> Iterator[Build]:
        """Lock an engine for building; leaving the block without `commit` removes all files of the build.

        A second process waits for the lock and then finds the finished engine in `Build.existing`.
        """
        path = engine.path(self.root)
        with self._locked(path):
            build = Build(engine, _hidden(path, "building"), self._finished(engine), self)
            try:
                with disk_errors(f"cannot build engine {path}"):
                    make_private_folder(build.folder)
                with full_disk_errors(f"cannot build engine {path}"):
                    yield build
            finally:
                _remove(build.folder)

    def update(self, engine: VerifiedEngine, manifest: Manifest) -> VerifiedEngine:
        """Replace the measurements (parity, latency, verified) of an engine; raise an EngineError if it was rebuilt."""
        with self._locked(engine.path):
            current = verify_engine(self.root, engine.manifest.id)
            if not current.manifest.same_engine(manifest):
                raise EngineError(f"engine {engine.path} was rebuilt in the meantime: measure it again")
            return self._replace_manifest(engine.path, manifest)

    def trust(self, path: Path) -> VerifiedEngine:
        """Sign an engine built elsewhere; raise an EngineError if it is not in this store or its files do not match."""
        engine = EngineId.of_path(path.resolve())
        if engine is None or engine.path(self.root).resolve() != path.resolve():
            raise EngineError(
                f"{path} is not in the engine store {self.root}: copy it to "
                "<model>/<stage>/<backend>-<key> there and trust the copy"
            )
        with self._locked(engine.path(self.root)):
            unsigned = verify_engine(self.root, engine, signed=False)
            return self._replace_manifest(unsigned.path, unsigned.manifest)

    def remove(self, record: EngineRecord) -> None:
        """Delete an engine; do nothing if it is already deleted."""
        with self._locked(record.path), disk_errors(f"cannot remove engine {record.path}"):
            _remove(_set_aside(record.path))
            _remove_runtime_caches(record.path)

    def prune(self, older_than: timedelta | None = None, max_bytes: int | None = None) -> list[EngineRecord]:
        """Remove engines older than `older_than`, the oldest ones beyond `max_bytes`, and interrupted builds."""
        self._sweep()
        sizes = [(record, record.bytes) for record in sorted(self.find(), key=lambda record: record.created)]
        total = sum(size for _, size in sizes)
        now = datetime.now(UTC)
        removed = []
        for record, size in sizes:
            too_old = older_than is not None and now - record.created > older_than
            too_much = max_bytes is not None and total > max_bytes
            if too_old or too_much:
                self.remove(record)
                removed.append(record)
                total -= size
        return removed

    def _stage_folders(self) -> list[Path]:
        return [stage for model in _folders(self.root) for stage in _folders(model)]

    def _record(self, engine: EngineId) -> EngineRecord | None:
        path = engine.path(self.root)
        try:
            check_no_symlink(self.root, path)
            return EngineRecord(engine, path, peek(path)) if path.is_dir() else None
        except EngineError as error:
            if not path.is_symlink() and not path.is_dir():
                return None  # removed by another process in the meantime
            return EngineRecord(engine, path, None, str(error))

    def _finished(self, engine: EngineId) -> VerifiedEngine | None:
        if self._record(engine) is None:
            return None
        try:
            return verify_engine(self.root, engine)
        except EngineError as error:
            log.warning("%s", error)
            return None

    def _replace_manifest(self, path: Path, manifest: Manifest) -> VerifiedEngine:
        with disk_errors(f"cannot write the manifest of engine {path}"):
            temporary = _hidden(path, "manifest")
            _write_synced(temporary, seal(manifest))
            temporary.replace(path / MANIFEST_FILE)
            sync(path)
        return VerifiedEngine(path, manifest)

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Lock the engine at `path` against changes by other processes, and remove files of interrupted builds."""
        check_no_symlink(self.root, path.parent)
        lock = FileLock(_hidden(path, "lock"))
        with disk_errors(f"cannot lock engine {path}"):
            make_private_folder(path.parent)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("waiting for another process that is building or changing %s", path)
                lock.acquire()
        try:
            _remove_debris(path)
            yield
        finally:
            lock.release()

    def _sweep(self) -> None:
        for folder in self._stage_folders():
            for debris in folder.glob(".*"):
                path, what = debris.with_name(debris.stem.removeprefix(".")), debris.suffix.removeprefix(".")
                if what not in _WORK_IN_PROGRESS or EngineId.of_path(path) is None:
                    continue
                try:
                    with disk_errors(f"cannot remove {debris}"), FileLock(_hidden(path, "lock"), timeout=0):
                        _remove_debris(path)
                except Timeout:
                    log.debug("%s is being built", path)


def _hidden(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def runtime_cache_path(engine: Path, artifact: str) -> Path:
    """Return the path of the runtime cache of a file of an engine.

    It is next to the engine's folder, which contains only the files that its manifest names.
    """
    return _hidden(engine, f"{artifact}.runtime_cache")


def _runtime_caches(engine: Path) -> list[Path]:
    return [*engine.parent.glob(f".{engine.name}.*.runtime_cache")]


def _remove_runtime_caches(engine: Path) -> None:
    for path in _runtime_caches(engine):
        _remove(path)


def _entries(folder: Path) -> list[Path]:
    """Return the entries of a folder; none if it is missing, not a folder, or not readable."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        log.warning("%s", error)
        return []


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, except symbolic links."""
    return [entry for entry in _entries(folder) if entry.is_dir() and not entry.is_symlink()]


def _status(path: Path) -> os.stat_result | None:
    """Return size and times of a file; None if another process removed it."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _set_aside(path: Path) -> Path:
    """Rename a folder to a hidden name in one step, so that it never appears partly deleted; return the new path."""
    old = _hidden(path, "old")
    with suppress(FileNotFoundError):
        path.rename(old)
    return old


def _remove_debris(path: Path) -> None:
    for what in _WORK_IN_PROGRESS:
        _remove(_hidden(path, what))


def _remove(path: Path) -> None:
    """Delete a folder as far as possible; the next process that holds the lock deletes the hidden remains."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _seal_artifact(path: Path) -> Artifact:
    """Flush a file to disk, and return its digest and size."""
    if path.is_symlink() or not path.is_file():
        raise EngineError(f"{path} is not a regular file: an engine is a flat folder of files")
    if path.name == MANIFEST_FILE or not re.fullmatch(NAME, path.name):
        raise EngineError(f"{path.name!r} is not a valid name of an engine file")
    make_private(path)
    sync(path)
    return Artifact(sha256=file_sha256(path), bytes=path.stat().st_size)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    make_private(path)
