"""Verify that an engine on disk is the one that its builder signed. Nothing is run or deserialised.

`manifest.json` is the canonical JSON of the manifest with one more field, `signature`: the HMAC-SHA256 of the canonical
JSON of all other fields. A single file ensures that a manifest and its signature are always replaced together.

A user who can write to the engine folder could replace a file between verification and loading. Loaders therefore get
the bytes that were hashed (`VerifiedEngine.read`). If a loader has to open files itself, as for large external weights,
only this user and root may have write access to them (`VerifiedEngine.onnx`).
"""

import hashlib
import json
import os
from collections.abc import Container, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError, Message
from pydantic import ValidationError

from frostline.errors import EngineError
from frostline.runtime.engines import signing
from frostline.runtime.engines.manifest import Artifact, EngineId, Manifest, canonical_json
from frostline.runtime.engines.privacy import check_private
from frostline.runtime.hints import export_command

MANIFEST_FILE = "manifest.json"
_MAX_MANIFEST_BYTES = 16 * 2**20


class _RefusedError(EngineError):
    """The reason why an engine is rejected; `verify_engine` adds the engine and the remedy."""


class _UnsignedError(_RefusedError):
    """The signature is invalid; only this error can be resolved by `frostline engines trust`."""


@dataclass(frozen=True)
class VerifiedEngine:
    """An engine with a valid signature and valid hashes: the only access to files for loading."""

    path: Path
    manifest: Manifest

    def onnx(self, name: str) -> bytes | Path:
        """Return an ONNX file for a loader: its content, or its path if its weights are in separate files.

        Raises:
            EngineError: the content has changed; a SharedFolderError if other users could replace the file.
        """
        if self.manifest.artifacts.keys() <= {network.artifact for network in self.manifest.networks}:
            return self.read(name)
        try:
            check_private(self.path.parents[2], (self.path / file for file in self.manifest.artifacts))
        except OSError as error:
            raise EngineError(f"engine {self.path}: {error}") from error
        self._expected(name)
        return self.path / name

    def read(self, name: str) -> bytes:
        """Return the content of a file, hashed again when it is read, so that it cannot be replaced in between.

        Raises:
            EngineError: the engine has no such file, or its content has changed.
        """
        try:
            return _read_artifact(self.path / name, self._expected(name))
        except (OSError, _RefusedError) as error:
            raise EngineError(f"engine {self.path}: {error}") from error

    def _expected(self, name: str) -> Artifact:
        if name not in self.manifest.artifacts:
            raise EngineError(
                f"engine {self.path} has no file {name}; its files are {', '.join(self.manifest.artifacts)}"
            )
        return self.manifest.artifacts[name]


def seal(manifest: Manifest) -> bytes:
    """Return the content of `manifest.json`: the manifest with this user's signature."""
    fields = manifest.fields()
    return canonical_json({**fields, "signature": signing.sign(canonical_json(fields))})


def peek(path: Path) -> Manifest:
    """Return the manifest of the engine at `path` without verification, for listing only, never for loading.

    Raises:
        EngineError: the manifest cannot be read.
    """
    try:
        return _parse(_read_sealed(path))
    except (OSError, _RefusedError) as error:
        raise EngineError(f"engine {path}: {error}") from error


def verify_engine(root: Path, engine: EngineId, *, signed: bool = True) -> VerifiedEngine:
    """Verify an engine, or raise an EngineError with the reason and the remedy.

    `signed=False` skips the signature only: for engines that `frostline engines trust` will sign.
    """
    path = engine.path(root)
    rebuild = f"`{export_command(engine.stage, engine.backend, '--force')}`"
    try:
        return _verify(root, engine, signed)
    except _UnsignedError as error:
        trust = f"run `frostline engines trust {path}` if you built it on another machine"
        raise EngineError(f"engine {path} is refused: {error}. Rebuild it with {rebuild}, or {trust}.") from error
    except (OSError, _RefusedError) as error:
        raise EngineError(f"engine {path} is refused: {error}. Rebuild it with {rebuild}.") from error


def check_no_symlink(root: Path, path: Path) -> None:
    """Raise an EngineError if a folder between `root` and `path` is a symlink, which could point outside the store."""
    for folder in (path, *path.parents):
        if folder == root:
            return
        if folder.is_symlink():
            raise _RefusedError(f"{folder} is a symlink, which the store does not follow")


def check_networks(manifest: Manifest) -> None:
    """Raise an EngineError if the file of a network is not one of the engine's files."""
    for network in manifest.networks:
        if network.artifact not in manifest.artifacts:
            raise _RefusedError(f"network {network.name} needs the file {network.artifact}, which is missing")


def check_external_data(name: str, model: bytes, files: Container[str]) -> None:
    """Raise an EngineError if the ONNX model `name` has external data that is not in `files` of its engine."""
    try:
        proto = onnx.load_model_from_string(model)
    except DecodeError as error:
        raise _RefusedError(f"{name} is not an ONNX model ({error})") from error
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
        where = PurePosixPath(location)
        if where.is_absolute() or ".." in where.parts:
            raise _RefusedError(f"{name} has external data outside the engine folder: {location!r}")
        if str(where) not in files:
            raise _RefusedError(f"{name} has external data in a missing file: {location!r}")


def _verify(root: Path, engine: EngineId, signed: bool) -> VerifiedEngine:
    path = engine.path(root)
    check_no_symlink(root, path)
    if not path.is_dir():
        raise _RefusedError("there is no such folder")
    sealed = _read_sealed(path)
    if signed:
        _check_signature(sealed)
    manifest = _parse(sealed)
    if manifest.id != engine:
        raise _RefusedError(f"{MANIFEST_FILE} describes another engine, {manifest.id.path(Path())}")
    check_networks(manifest)
    _check_files(path, manifest)
    return VerifiedEngine(path, manifest)


def _read_sealed(path: Path) -> bytes:
    file_path = path / MANIFEST_FILE
    with _open_regular(file_path) as file:
        data = file.read(_MAX_MANIFEST_BYTES + 1)
    if len(data) > _MAX_MANIFEST_BYTES:
        raise _RefusedError(f"{MANIFEST_FILE} is larger than {_MAX_MANIFEST_BYTES} bytes")
    return data


def _fields(sealed: bytes) -> tuple[dict[str, object], str]:
    """Return the manifest's fields and the signature."""
    try:
        fields = json.loads(sealed)
        signature = fields.pop("signature")
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise _RefusedError(f"{MANIFEST_FILE} is damaged ({error!r})") from error
    return fields, str(signature)


def _check_signature(sealed: bytes) -> None:
    fields, signature = _fields(sealed)
    # Comparing the whole file with its canonical form detects a change of any byte, including white space.
    try:
        holds = canonical_json({**fields, "signature": signature}) == sealed
    except ValueError:
        holds = False
    if not holds or not signing.verify(canonical_json(fields), signature):
        raise _UnsignedError(
            f"the signature in {MANIFEST_FILE} is invalid: the manifest was changed, or signed with another key"
        )


def _parse(sealed: bytes) -> Manifest:
    fields, _ = _fields(sealed)
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _RefusedError(f"{MANIFEST_FILE} is damaged ({where}: {first['msg']})") from error


def _check_files(path: Path, manifest: Manifest) -> None:
    found = {entry.name for entry in path.iterdir()} - {MANIFEST_FILE}
    if unexpected := sorted(found - manifest.artifacts.keys()):
        raise _RefusedError(f"{unexpected[0]} is not part of the engine")
    for name, expected in manifest.artifacts.items():
        if name.endswith(".onnx"):
            check_external_data(name, _read_artifact(path / name, expected), manifest.artifacts)
        else:
            _hash_artifact(path / name, expected)


def _hash_artifact(path: Path, expected: Artifact) -> None:
    """Check size and digest of a file, read in chunks: an engine can be larger than memory."""
    with _open_artifact(path, expected) as file:
        _check_digest(path, hashlib.file_digest(file, "sha256").hexdigest(), expected)


def _read_artifact(path: Path, expected: Artifact) -> bytes:
    with _open_artifact(path, expected) as file:
        content = file.read()
    _check_digest(path, hashlib.sha256(content).hexdigest(), expected)
    return content


def _open_artifact(path: Path, expected: Artifact) -> BufferedReader:
    file = _open_regular(path)
    size = os.fstat(file.fileno()).st_size
    if size != expected.bytes:
        file.close()
        raise _RefusedError(f"{path.name} has {size} bytes, but the manifest states {expected.bytes}")
    return file


def _check_digest(path: Path, digest: str, expected: Artifact) -> None:
    if digest != expected.sha256:
        raise _RefusedError(f"the hash of {path.name} differs from the manifest: the file was changed")


def _open_regular(path: Path) -> BufferedReader:
    """Open a file that is neither a symlink nor a device or pipe (opening a pipe could block forever)."""
    if path.is_symlink():
        raise _RefusedError(f"{path.name} is a symlink")
    if not path.exists():
        raise _RefusedError(f"{path.name} is missing")
    if not path.is_file():
        raise _RefusedError(f"{path.name} is not a regular file")
    # O_NOFOLLOW rejects a symlink that replaces the file at this moment.
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model, including those in attributes, subgraphs and functions."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _tensors(part)
