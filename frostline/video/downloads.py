"""Download videos at URLs to temporary files, with limits on size and time."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from frostline.errors import DataError
from frostline.paths import is_url

_PIECE = 2**20
_SILENCE = 60.0
_HTTP = ("http", "https")
# URL schemes that pyarrow supports.
_ARROW = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
_LOCAL = ("file", "local")


@dataclass(frozen=True)
class DownloadLimits:
    """Limits for the download of a video.

    Attributes:
        megabytes: the maximum size in MB (10^6 bytes).
        seconds: the maximum duration.
    """

    megabytes: float = 4000.0
    seconds: float = 600.0


DEFAULT_LIMITS = DownloadLimits()


@contextlib.contextmanager
def local_copy(name: str, limits: DownloadLimits) -> Iterator[str]:
    """Provide the content of `name` as a local file in the block; a name that is not a URL is used as a path.

    Raises:
        DataError: the video cannot be downloaded, or exceeds a limit.
    """
    if not is_url(name):
        yield name
        return
    with tempfile.NamedTemporaryFile(prefix="frostline-") as copy:
        _download(name, copy, limits)
        copy.flush()
        yield copy.name


def _download(url: str, copy: Any, limits: DownloadLimits) -> None:
    deadline, size = time.monotonic() + limits.seconds, 0
    try:
        with _opened(url, limits) as source:
            # `read1` returns the available bytes, so that a slow server cannot exceed the time limit within one call.
            read = getattr(source, "read1", source.read)
            while piece := read(_PIECE):
                size += len(piece)
                if size > limits.megabytes * 1e6:
                    raise DataError(f"{url}: is larger than {limits.megabytes:g} MB (--max-download-size)")
                if time.monotonic() > deadline:
                    raise DataError(f"{url}: takes longer than {limits.seconds:g} s (--download-timeout)")
                copy.write(piece)
            stated = getattr(source, "headers", {}).get("Content-Length")
            if stated is not None and size < int(stated):
                raise DataError(f"{url}: cannot be downloaded: the connection ended after {size} of {stated} bytes")
    except DataError:
        raise
    except urllib.error.HTTPError as error:
        raise DataError(f"{url}: cannot be downloaded: the server returned {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise DataError(
            f"{url}: the server does not answer within --download-timeout, or within {_SILENCE:g} s if that is shorter"
        ) from error
    except urllib.error.URLError as error:
        raise DataError(f"{url}: cannot be downloaded: {error.reason}") from error
    except http.client.HTTPException as error:
        raise DataError(f"{url}: cannot be downloaded: {error or type(error).__name__}") from error
    except OSError as error:
        raise DataError(f"{url}: cannot be downloaded: {error}") from error
    except ValueError as error:
        raise DataError(f"{url}: this URL cannot be downloaded: {error}") from error


def _opened(url: str, limits: DownloadLimits) -> Any:
    """Open a URL for reading."""
    scheme = url.partition("://")[0].lower()
    if scheme in _HTTP:
        return urllib.request.urlopen(url, timeout=min(limits.seconds, _SILENCE))
    if scheme in _LOCAL:
        raise DataError(f"{url}: use the path of a local file, not a URL")
    if scheme in _ARROW and importlib.util.find_spec("pyarrow") is not None:
        from pyarrow import fs

        system, path = fs.FileSystem.from_uri(url)
        return system.open_input_stream(path)
    import fsspec

    try:
        return fsspec.open(url, "rb")
    except ImportError as error:
        hint = "uv pip install 'frostline[ray]'" if scheme in _ARROW else str(error)
        raise DataError(f"{url}: no installed package supports {scheme}://: {hint}") from error
