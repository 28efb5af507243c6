"""The per-user key that signs engine manifests, and whatever else is believed because this user wrote it.

Engines are executable code, so an engine is loaded only if this user's key signed its manifest. Cached outputs and
notes are signed as well. The key never leaves the user's machine: 32 random bytes, mode 0600, outside any repository.
"""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from frostline.errors import EngineError

KEY_BYTES = 32
KEY_FILE_VARIABLE = "FROSTLINE_SIGNING_KEY_FILE"


def key_path() -> Path:
    """Return `$FROSTLINE_SIGNING_KEY_FILE`, or `signing.key` in the user's configuration folder."""
    override = os.environ.get(KEY_FILE_VARIABLE)
    if override:
        return Path(override)
    import platformdirs  # only this default needs it

    return platformdirs.user_config_path("frostline") / "signing.key"


def sign(data: bytes) -> str:
    """HMAC-SHA256 of `data` with this user's key, in hexadecimal; the key is made on first use."""
    return hmac.new(_key(), data, hashlib.sha256).hexdigest()


def verify(data: bytes, signature: str) -> bool:
    """Return whether `signature` is this user's signature of `data`, in constant time."""
    # A file may state any text for a signature, half of a surrogate pair too.
    return hmac.compare_digest(sign(data).encode(), signature.encode(errors="surrogatepass"))


def _key() -> bytes:
    path = key_path()
    try:
        if not path.exists():
            _create(path)
        return _read(path)
    except OSError as error:
        raise EngineError(
            f"signing key {path} cannot be read or made ({error.strerror}). "
            f"Point {KEY_FILE_VARIABLE} at a place that you can write to."
        ) from error


def _create(path: Path) -> None:
    """Put a whole key at `path` in one step; of several processes the first wins, and all use its key."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(temporary)  # unlike a rename, a link never replaces the key of a faster process
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())  # of the open file: what is checked is what is read
        if status.st_uid != os.geteuid():
            raise EngineError(
                f"signing key {path} belongs to another user (uid {status.st_uid}). "
                f"Point {KEY_FILE_VARIABLE} at a key file of your own."
            )
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise EngineError(
                f"signing key {path} is open to other users (mode {stat.S_IMODE(status.st_mode):04o}). "
                f"Run: chmod 600 {path}"
            )
        key = file.read()
    if len(key) < KEY_BYTES:
        raise EngineError(
            f"signing key {path} has {len(key)} bytes and needs {KEY_BYTES}. Delete it: the next use makes "
            "a new one, and `frostline engines trust PATH` signs your engines again."
        )
    return key
