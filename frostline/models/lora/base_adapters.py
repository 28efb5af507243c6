"""Adapters that are part of a base model: merged into the weights of its denoiser whenever these are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from frostline.models.checkpoints.formats.network import NetworkFiles

from .merging import check_fits, merged_weight
from .names import LayerPath, denoiser_path
from .reading import adapter_files, read_adapter

if TYPE_CHECKING:
    import torch

    from frostline.config import BaseAdapter


@dataclass(frozen=True)
class MergedRead:
    """How the weights of one denoiser are read: with adapters merged into them.

    It keeps no tensors, so that weights that were released can be read again in the same way.

    adapters: each path with its scale, in the order in which they are merged. layer_path: see `read_adapter`.
    """

    adapters: tuple[tuple[Path, float], ...]
    layer_path: LayerPath = denoiser_path

    @classmethod
    def of(cls, adapters: Sequence[BaseAdapter], layer_path: LayerPath = denoiser_path) -> MergedRead:
        """Return it for settings that are all of one denoiser."""
        return cls(tuple((adapter.path, adapter.scale) for adapter in adapters), layer_path)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the adapters."""
        return tuple(file for path, _ in self.adapters for file in adapter_files(path))

    @property
    def identity(self) -> str:
        """What else than files the weights depend on: the scales."""
        return " ".join(repr(scale) for _, scale in self.adapters)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Hold the adapters against the shapes of a denoiser's weights, by official name.

        Raises:
            ConfigError: one cannot be read, or is of another model; names its path.
        """
        for path, _ in self.adapters:
            check_fits(read_adapter(path, self.layer_path), shapes)

    def read(
        self, network: NetworkFiles, dtype: torch.dtype, device: str | torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights of `network`, of one type, one at a time and in Wan's own spelling.

        They are those of the file that `frostline adapter merge` writes without a precision, bit for bit, of several
        adapters one after the other: so they are rounded to the type that they are stored in, then to `dtype`.

        Raises:
            ConfigError: an adapter cannot be read, is of another model, or a merged weight is not finite.
        """
        adapters = [(read_adapter(path, self.layer_path), scale) for path, scale in self.adapters]
        for adapter, _ in adapters:
            check_fits(adapter, network.shapes)
        # On the CPU, where the merge of a file is computed, too.
        for name, weight in network.read_exact().items():
            stored = network.compute_dtype or weight.dtype
            for adapter, scale in adapters:
                weight = merged_weight(adapter, name, weight, scale, stored)
            yield name, weight.to(device, dtype)
