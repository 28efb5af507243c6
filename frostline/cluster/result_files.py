"""Write the results file of a run on a cluster: one file, local or at a URL, in the order of the input."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from frostline import atomic_io
from frostline.cluster.file_systems import exists, file_system_of
from frostline.cluster.result_tables import ParquetFile
from frostline.cluster.streamed_rows import StreamedRows
from frostline.errors import ConfigError, DataError
from frostline.paths import is_url
from frostline.score.files import SUFFIXES, ResultFile
from frostline.score.result import FACE_SCORE, VideoScore

PARQUET = ".parquet"


class StoredRows(StreamedRows):
    """Iterate over the rows of a results file. The rows are read from the file each time, not kept in memory.

    Args:
        name: a path or URL that ends in `.jsonl`, `.csv` or `.parquet`; the file need not exist.
        labels: the labels of all rewards.
    Raises:
        ConfigError: the name has another suffix.
    """

    def __init__(self, name: str, labels: Sequence[str]) -> None:
        self.name = name
        # A file at a URL is read and written through a local copy.
        self._copies = tempfile.TemporaryDirectory(prefix="frostline-") if is_url(name) else None
        self.path = Path(self._copies.name, name.rsplit("/", 1)[-1]) if self._copies else Path(name)
        scores, faces = [label for label in labels if label != FACE_SCORE], FACE_SCORE in labels
        if self.path.suffix == PARQUET:
            self._file: ResultFile | ParquetFile = ParquetFile(self.path, scores, faces)
        elif self.path.suffix in SUFFIXES:
            self._file = ResultFile(self.path, scores, faces)
        else:
            raise ConfigError(f"{name}: the name of the results file must end in {', '.join(SUFFIXES)} or {PARQUET}")

    def exists(self) -> bool:
        """Return whether the file exists.

        Raises:
            ConfigError: the file system cannot be accessed.
        """
        return exists(self.name)

    def check_writable(self) -> None:
        """Check that a local file can be written; does nothing for a URL.

        Raises:
            DataError: the file cannot be written.
        """
        if self._copies is None:
            atomic_io.check_writable(self.path)

    def fetch(self) -> None:
        """Download the file if it is at a URL.

        Raises:
            DataError: the file cannot be read.
        """
        if self._copies is not None:
            system, path = file_system_of(self.name)
            try:
                with system.open_input_stream(path) as source, self.path.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{self.name}: cannot be read: {error}") from error

    def rewrite(self, rows: Sequence[VideoScore]) -> None:
        """Replace the content of the file by these rows.

        Raises:
            DataError: the file cannot be written.
        """
        self._count = None
        self._file.rewrite(rows)
        if self._copies is not None:
            upload(self.path, self.name)

    def __iter__(self) -> Iterator[VideoScore]:
        return self._file.stream()


def upload(path: Path, url: str) -> None:
    """Upload a local file to a URL.

    Raises:
        DataError: the file cannot be written there.
    """
    system, target = file_system_of(url)
    try:
        with path.open("rb") as source, system.open_output_stream(target) as copy:
            shutil.copyfileobj(source, copy)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{url}: cannot be written: {error}") from error
