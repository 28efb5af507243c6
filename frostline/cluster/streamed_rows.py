"""Use rows that are read from files as a sequence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import overload

from frostline.score.result import VideoScore


class StreamedRows(Sequence[VideoScore]):
    """Base class of rows that can only be iterated from the start. The number of rows is cached until they change."""

    _count: int | None = None

    @abstractmethod
    def __iter__(self) -> Iterator[VideoScore]: ...

    def count_rows(self) -> int:
        """Count the rows by reading all of them."""
        return sum(1 for _ in self)

    def __len__(self) -> int:
        if self._count is None:
            self._count = self.count_rows()
        return self._count

    @overload
    def __getitem__(self, place: int) -> VideoScore: ...
    @overload
    def __getitem__(self, place: slice) -> list[VideoScore]: ...
    def __getitem__(self, place: int | slice) -> VideoScore | list[VideoScore]:
        if isinstance(place, slice):
            return list(islice(iter(self), *place.indices(len(self))))
        return next(islice(iter(self), range(len(self))[place], None))
