"""The per-user key that signs engine manifests and all other files that are trusted because this user wrote them.

Engines are executable code, so an engine is loaded only if this user's key signed its manifest. Cached outputs and
files in the user's cache folder are signed as well. The key never leaves the user's machine: 32 random bytes, mode
0600, outside any repository.
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
    import platformdirs  # imported only for this default

    return platformdirs.user_config_path("frostline") / "signing.key"


def sign(data: bytes) -> str:
    """Return the HMAC-SHA256 of `data` with this user's key, in hexadecimal. The first use creates the key.

    Raises:
        EngineError: the key cannot be read or created, or other users have access to it.
    """
    return hmac.new(_key(), data, hashlib.sha256).hexdigest()


def verify(data: bytes, signature: str) -> bool:
    """Return whether `signature` is this user's signature of `data`. Takes constant time.

    Raises:
        EngineError: see `sign`.
    """
    # An untrusted signature may be any text, including a lone surrogate.
    return hmac.compare_digest(sign(data).encode(), signature.encode(errors="surrogatepass"))


def _key() -> bytes:
    path = key_path()
    try:
        if not path.exists():
            _create(path)
        return _read(path)
    except OSError as error:
        raise EngineError(
            f"signing key {path} cannot be read or created ({error.strerror}). Set "
            f"{KEY_FILE_VARIABLE} to a writable path."
        ) from error


def _create(path: Path) -> None:
    """Create a complete key at `path` in one step; if several processes do so, all use the first key."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(temporary)  # unlike a rename, a link never replaces the key of another process
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        status = os.fstat(
            file.fileno()
        )  # status of the open file, so that the file that is checked is the one that is read
        if status.st_uid != os.geteuid():
            raise EngineError(
                f"signing key {path} belongs to another user (uid {status.st_uid}). Set "
                f"{KEY_FILE_VARIABLE} to a key file of your own."
            )
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise EngineError(
                f"signing key {path} is accessible to other users (mode "
                f"{stat.S_IMODE(status.st_mode):04o}). Run: chmod 600 {path}"
            )
        key = file.read()
    if len(key) < KEY_BYTES:
        raise EngineError(
            f"signing key {path} has {len(key)} bytes instead of {KEY_BYTES}. Delete it: the next "
            "use creates a new one, and `frostline engines trust PATH` signs your engines again."
        )
    return key
