"""Adapters of a base model: merged into the weights of its denoiser each time these are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from frostline.atomic_io import file_sha256
from frostline.errors import ConfigError
from frostline.models.checkpoints.formats.network import NetworkFiles

from .merging import check_fits, merged_weight
from .names import LayerPath, denoiser_path
from .reading import adapter_files, read_adapter

if TYPE_CHECKING:
    import torch

    from frostline.config import BaseAdapter


def adapter_digests(paths: Iterable[Path]) -> list[str]:
    """Return the SHA-256 of each file of some adapters, in order.

    Raises:
        ConfigError: a file cannot be read.
    """
    try:
        return [_digest(file, file.stat().st_mtime_ns) for path in paths for file in adapter_files(path)]
    except OSError as error:
        raise ConfigError(f"base_adapters: {error.filename} cannot be read: {error.strerror}") from error


@cache
def _digest(file: Path, mtime_ns: int) -> str:
    return file_sha256(file)


@dataclass(frozen=True)
class MergedRead:
    """Reads the weights of one denoiser with adapters merged into them.

    It stores no tensors, so that released weights can be read again in the same way.

    Attributes:
        adapters: paths with scales, in the order of merging.
        layer_path: see `read_adapter`.
    """

    adapters: tuple[tuple[Path, float], ...]
    layer_path: LayerPath = denoiser_path

    @classmethod
    def of(cls, adapters: Sequence[BaseAdapter], layer_path: LayerPath = denoiser_path) -> MergedRead:
        """Return the reader for the base adapters of one denoiser."""
        return cls(tuple((adapter.path, adapter.scale) for adapter in adapters), layer_path)

    @property
    def files(self) -> tuple[Path, ...]:
        """Return all files of the adapters."""
        return tuple(file for path, _ in self.adapters for file in adapter_files(path))

    @property
    def identity(self) -> str:
        """Return what the weights depend on in addition to the files: the scales."""
        return " ".join(repr(scale) for _, scale in self.adapters)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check the adapters against the shapes of a denoiser's weights, by name in Wan's format.

        Raises:
            ConfigError: an adapter cannot be read, or is for another model; the message names its path.
        """
        for path, _ in self.adapters:
            check_fits(read_adapter(path, self.layer_path), shapes)

    def read(
        self, network: NetworkFiles, dtype: torch.dtype, device: str | torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights of `network` by name in Wan's format, with one dtype, one at a time.

        The values are bit-identical to the file that `frostline adapter merge` writes without a precision (for several
        adapters, one after the other): they are rounded to the dtypes of that file, then to `dtype`.

        Raises:
            ConfigError: an adapter cannot be read, is for another model, or a merged weight is not finite.
        """
        adapters = [(read_adapter(path, self.layer_path), scale) for path, scale in self.adapters]
        for adapter, _ in adapters:
            check_fits(adapter, network.shapes)
        # On the CPU, like the merge to a file.
        for name, weight in network.read_exact().items():
            stored = network.compute_dtype or weight.dtype
            for adapter, scale in adapters:
                weight = merged_weight(adapter, name, weight, scale, stored)
            yield name, weight.to(device, dtype)
