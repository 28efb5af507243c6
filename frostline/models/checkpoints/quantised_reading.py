"""Read a network with layers in 8 or 4 bits: each weight is quantised before the next one is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from frostline.models.quantization.linear import quantised_layers
from frostline.models.quantization.storage import FORMATS

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from .formats.network import NetworkFiles


class NetworkRead(Protocol):
    """Reads a network whose weights differ from those in its files, for example by a merged adapter.

    Attributes:
        files: further files that it reads.
        identity: what else the weights depend on.
    """

    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def identity(self) -> str: ...

    def read(
        self, network: NetworkFiles, dtype: torch.dtype, device: str | torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the final weights one at a time, in the format of `NetworkFiles.read`."""
        ...


@dataclass(frozen=True)
class StoredLayers:
    """The layers of a network that are stored in fewer bits.

    Attributes:
        kind: storage format of all of them, one of `FORMATS`.
    """

    kind: str
    paths: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module) -> StoredLayers | None:
        """Return the quantised layers of a module; None if it has none."""
        layers = quantised_layers(module)
        return cls(next(iter(layers.values())).kind, frozenset(layers)) if layers else None

    def read(
        self, network: NetworkFiles, dtype: torch.dtype, device: str | torch.device, how: NetworkRead | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a denoiser or a text encoder, by their names in the module.

        If `kind` is `fp8` and nothing is merged, float8_e4m3fn weights with at most one scale for each row are kept as
        they are in the file. All other 8-bit weights are dequantised and quantised again, like the weights of other
        files.

        Args:
            dtype: dtype of all other weights; weights are also rounded to it before they are quantised.
            how: reader for weights that differ from those in the files.
        Raises:
            ConfigError: a file cannot be read, or `how` raises it.
        """
        if how is not None:
            for name, weight in how.read(network, dtype, device):
                yield from self._stored(name, weight)
            return
        weights = network.read_exact(mapped=True)
        for name in weights:
            path, kept = self._layer(name), None
            if path is not None and self.kind == "fp8":
                kept = weights.as_rows(name)
            if path is None or kept is None:
                # Copied, because it may share the memory of a file.
                yield from self._stored(name, weights[name].to(device, dtype, copy=True))
            else:
                codes, scale = (tensor.to(device, copy=True) for tensor in kept)
                yield from ((f"{path}.codes", codes), (f"{path}.scale", scale))

    def _layer(self, name: str) -> str | None:
        """Return the path of the layer that owns a weight."""
        path, _, leaf = name.rpartition(".")
        return path if leaf == "weight" and path in self.paths else None

    def _stored(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        path = self._layer(name)
        if path is None:
            yield name, weight
        else:
            yield from zip((f"{path}.codes", f"{path}.scale"), FORMATS[self.kind].quantise(weight), strict=True)
