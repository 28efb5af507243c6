"""TensorRT-RTX's runtime cache: kernels compiled for this GPU while an engine ran, stored for the next process.

They are executable code, like the engine: a cache is loaded only if this user's key signed it for the same engine.
"""

from __future__ import annotations

import logging

from frostline.atomic_io import atomic_write
from frostline.errors import DataError, EngineError
from frostline.runtime.engines import signing
from frostline.runtime.engines.store import runtime_cache_path
from frostline.runtime.engines.verification import VerifiedEngine

log = logging.getLogger(__name__)

_SIGNATURE_BYTES = 64


class RuntimeCache:
    """One file for one network of an engine: the signature in hexadecimal, and the content.

    Args:
        artifact: the engine's file that the cache belongs to.
    """

    def __init__(self, engine: VerifiedEngine, artifact: str) -> None:
        self.path = runtime_cache_path(engine.path, artifact)
        self._engine = engine.manifest.artifacts[artifact].sha256.encode()

    def read(self) -> bytes | None:
        """Return the content; None if there is no cache that this user signed for this engine."""
        try:
            data = self.path.read_bytes() if self.path.is_file() and not self.path.is_symlink() else b""
        except OSError as error:
            log.warning("runtime cache %s cannot be read: %s", self.path, error)
            return None
        signature, content = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        if not data:
            return None
        if not signing.verify(self._signed(content), signature.decode("ascii", "replace")):
            log.warning("runtime cache %s is not signed with your key and is not used", self.path)
            return None
        return content

    def write(self, content: bytes) -> None:
        """Replace the file; if that is not possible, the next process compiles again."""
        try:
            signature = signing.sign(self._signed(content)).encode()
            with atomic_write(self.path) as part:
                part.write_bytes(signature + content)
        except (DataError, EngineError) as error:
            log.debug("cannot write the runtime cache: %s", error)

    def _signed(self, content: bytes) -> bytes:
        return b"runtime cache of " + self._engine + b"\n" + content
