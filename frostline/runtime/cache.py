"""The cache of frozen outputs: outputs of a frozen stage are computed once and read afterwards.

An entry is a dict of tensors, stored under the hash of everything that it depends on (`content_key`). Entries are
therefore never stale; they are only evicted. On disk, an entry is a plain safetensors file with a digest of its content
and the user's signature of that digest. Entries that other users wrote or changed are computed again.

Entries that were computed in one batch are written to disk together or not at all: if a process was killed between two
of them, the rest would later be computed in a smaller batch, and the results could differ in the last bits.
"""

import hashlib
import json
import logging
import os
import shutil
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import safetensors.torch
import torch
from torch import Tensor

from frostline.atomic_io import atomic_write
from frostline.errors import DataError, EngineError
from frostline.paths import open_regular
from frostline.runtime.engines import signing
from frostline.runtime.identity.tensor_bytes import tensor_bytes

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

_HOT_BYTES = 256 * 2**20  # memory in front of a disk cache
_ABANDONED_SECONDS = 3600  # a temporary file older than this has no active writer


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


def content_key(**parts: object) -> str:
    """Return a hash of all parts, as 64 hexadecimal digits: tensors, str, bytes, numbers, None, and lists or dicts of
    them.

    The hash of a tensor covers dtype, shape and bytes, on any device. The order of a dict has no effect; a list and a
    tuple with the same items have the same hash.

    Raises:
        TypeError: a part has another type.
    """
    digest = hashlib.sha256()
    _feed(digest, parts)
    return digest.hexdigest()


def _feed(digest: _Hash, part: object) -> None:
    """Hash a part with its type and length first, so that different values never yield the same bytes."""
    match part:
        case None:
            digest.update(b"none;")
        case bool() | int() | float():
            kind = bool if isinstance(part, bool) else int if isinstance(part, int) else float
            digest.update(f"{kind.__name__}:{kind(part)!r};".encode())
        case str():
            _feed_bytes(digest, b"str", part.encode())
        case bytes():
            _feed_bytes(digest, b"bytes", part)
        case Tensor():
            kind = f"{part.dtype}{tuple(part.shape)}".encode()
            _feed_bytes(digest, kind, tensor_bytes(part))
        case list() | tuple():
            digest.update(f"list:{len(part)};".encode())
            for item in part:
                _feed(digest, item)
        case dict() if all(isinstance(name, str) for name in part):
            digest.update(f"dict:{len(part)};".encode())
            for name in sorted(part):
                _feed(digest, name)
                _feed(digest, part[name])
        case _:
            raise TypeError(f"cannot make a cache key from {type(part).__name__}: {part!r:.80}")


def _feed_bytes(digest: _Hash, kind: bytes, data: bytes | memoryview) -> None:
    digest.update(kind + b":%d:" % len(data))
    digest.update(data)


class FrozenOutputCache:
    """Store tensors by content key, in memory and (given a `root`) on disk; the least recently used are evicted.

    Any number of processes may share one `root`. Disk errors never raise exceptions.
    """

    def __init__(self, root: Path | None, max_bytes: int) -> None:
        self._memory = _Memory(max_bytes if root is None else min(max_bytes, _HOT_BYTES))
        self._disk = None if root is None else _Disk(root, max_bytes)
        self.hits = 0
        self.misses = 0

    @property
    def corrupted(self) -> int:
        """Return the number of entries that were found damaged on disk and dropped."""
        return self._disk.corrupted if self._disk else 0

    @property
    def writable(self) -> bool:
        """Return whether entries can be written; False after writing to the disk has failed."""
        return self._disk is None or self._disk.writable

    def on_disk(self, key: str) -> int | None:
        """Return the size of an entry's file in bytes without reading it; None if there is none."""
        return None if self._disk is None else self._disk.size(key)

    def get(self, key: str, device: torch.device | str = "cpu") -> Tensors | None:
        """Return a copy of an entry, on `device`; None if there is no valid entry."""
        tensors = self._memory.get(key)
        if tensors is not None:
            if self._disk:
                self._disk.touch(key)
        elif self._disk and (tensors := self._disk.get(key)) is not None:
            self._memory.put(key, tensors)
        if tensors is None:
            self.misses += 1
            return None
        self.hits += 1
        return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store a copy of `tensors`, detached from their graph."""
        self.put_batch({key: tensors})

    def put_batch(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Store a copy of each of these entries, by key; they are written to disk together or not at all."""
        own = {key: {name: _own_copy(tensor) for name, tensor in entry.items()} for key, entry in entries.items()}
        for key, entry in own.items():
            self._memory.put(key, entry)
        if self._disk:
            self._disk.put_batch(own)

    def get_or_compute(
        self, key: str, compute: Callable[[], Mapping[str, Tensor]], device: torch.device | str = "cpu"
    ) -> Tensors:
        """Return a copy of an entry, on `device`; if there is none, call `compute`, store its result and return it."""
        cached = self.get(key, device)
        if cached is not None:
            return cached
        computed = compute()
        self.put(key, computed)
        return {name: tensor.detach().to(device) for name, tensor in computed.items()}


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


class _Memory:
    """Entries in the memory of this process, the most recently used last."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[str, Tensors] = OrderedDict()

    def get(self, key: str) -> Tensors | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: str, tensors: Tensors) -> None:
        size = _size(tensors)
        if size > self._max_bytes:
            return
        self._bytes += size - _size(self._entries.pop(key, {}))
        self._entries[key] = tensors
        while self._bytes > self._max_bytes:
            _, forgotten = self._entries.popitem(last=False)
            self._bytes -= _size(forgotten)


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


class _ForeignError(Exception):
    """An entry is intact but was not signed with this user's key."""


class _Disk:
    """Entries as files `<key>.safetensors`; the modification time is the time of last use."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self.writable = True
        self._met_foreign = False
        self.corrupted = 0
        for batch in root.glob("*.batch"):
            _spread(batch)

    def get(self, key: str) -> Tensors | None:
        path = self._path(key)
        try:
            with open_regular(path) as file:
                # Larger files are not entries, or were written with a larger limit; the next eviction deletes them.
                data = file.read() if os.fstat(file.fileno()).st_size <= self._max_bytes else None
        except (OSError, DataError):
            return None
        if data is None:
            return None
        try:
            tensors = _decode(key, data)
        except _ForeignError:
            self._tell_of_foreign()
            return None
        except EngineError as error:
            self._give_up(error)
            return None
        except Exception as error:  # a damaged file may cause any exception in the parser
            self.corrupted += 1
            log.warning("cache entry %s is damaged (%s) and is computed again", path, error)
            _unlink(path)
            return None
        self.touch(key)
        return tensors

    def _tell_of_foreign(self) -> None:
        if not self._met_foreign:
            self._met_foreign = True
            log.warning(
                "the cache %s contains entries that were not signed with your key (%s); they are computed again",
                self._root,
                signing.key_path(),
            )

    def size(self, key: str) -> int | None:
        try:
            return self._path(key).stat().st_size
        except OSError:
            return None

    def touch(self, key: str) -> None:
        try:
            os.utime(self._path(key))
        except OSError:
            log.debug("cannot update the time of cache entry %s", key)  # deleted or read-only; it is evicted earlier

    def put_batch(self, entries: Mapping[str, Tensors]) -> None:
        if not self.writable:
            return
        try:
            files = {self._path(key): _encode(key, tensors) for key, tensors in entries.items()}
            fitting = {path: data for path, data in files.items() if len(data) <= self._max_bytes}
            if len(fitting) < len(files):
                log.debug("%d entries exceed the size of the cache", len(files) - len(fitting))
            if not fitting:
                return
            if len(fitting) > 1:
                self._write_together(fitting)
            else:
                ((path, data),) = fitting.items()
                with atomic_write(path) as part:
                    part.write_bytes(data)
            self._forget()
        except (DataError, EngineError, OSError) as error:
            self._give_up(error)

    def _write_together(self, files: Mapping[Path, bytes]) -> None:
        """Write all files to a folder with a temporary name, rename the folder, and move the files out of it.

        If the process is killed after the rename, the next process that opens the cache moves the files.
        """
        name = uuid4().hex
        part, batch = self._root / f".{name}.part", self._root / f"{name}.batch"
        try:
            part.mkdir(parents=True)
            for path, data in files.items():
                (part / path.name).write_bytes(data)
            part.replace(batch)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _spread(batch)

    def _give_up(self, error: Exception) -> None:
        if self.writable:
            self.writable = False
            log.warning("cannot write to the cache %s (%s); new entries are kept in memory only", self._root, error)

    def _path(self, key: str) -> Path:
        return self._root / f"{key}.safetensors"

    def _forget(self) -> None:
        """Delete the least recently used entries until the rest fits, and temporary files of ended processes."""
        entries, total = [], 0
        for file in os.scandir(self._root):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue  # another process deleted it first
            if file.name.endswith(".safetensors"):
                entries.append((status.st_mtime_ns, status.st_size, Path(file.path)))
                total += status.st_size
            elif file.name.endswith(".part") and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                if file.is_dir(follow_symlinks=False):
                    shutil.rmtree(file.path, ignore_errors=True)
                else:
                    _unlink(Path(file.path))
        for _, size, path in sorted(entries):
            if total <= self._max_bytes:
                return
            _unlink(path)
            total -= size


def _encode(key: str, tensors: Tensors) -> bytes:
    digest = content_key(key=key, tensors=tensors)
    return safetensors.torch.save(tensors, metadata={"seal": f"{digest} {signing.sign(_signed(digest))}"})


def _decode(key: str, data: bytes) -> Tensors:
    """Return the tensors of a file; raise an exception if this user did not write this content for this key."""
    tensors = safetensors.torch.load(data)
    (header_bytes,) = struct.unpack_from("<Q", data)
    metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
    stated, _, signature = metadata["seal"].partition(" ")
    digest = content_key(key=key, tensors=tensors)
    if stated != digest:
        raise ValueError("the digest differs")
    if not signing.verify(_signed(digest), signature):
        raise _ForeignError
    return tensors


def _signed(digest: str) -> bytes:
    # The signature is of the digest, which covers all bytes: signing the bytes would read them twice.
    return f"frostline cache entry {digest}".encode()


def _spread(batch: Path) -> None:
    """Move the entries of a complete batch to their final paths; another process may do the same at the same time."""
    if batch.is_symlink():
        return
    try:
        for path in batch.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                path.replace(batch.parent / path.name)
        batch.rmdir()
    except FileNotFoundError:
        log.debug("another process has moved the entries of %s", batch)
    except OSError as error:
        log.warning("cannot move the entries of %s: %s", batch, error)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.debug("cannot delete %s: %s", path, error)
