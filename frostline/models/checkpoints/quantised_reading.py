"""Read a network whose layers are stored in 8 or 4 bits: each weight is quantised before the next one is read."""

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
    """A way to read a network in which its weights are not just those in its files.

    files: those that it reads beside the network's. identity: what else the weights depend on.
    """

    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def identity(self) -> str: ...

    def read(
        self, network: NetworkFiles, dtype: torch.dtype, device: str | torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what `NetworkFiles.read` returns for the weights as they are to be, one at a time."""
        ...


@dataclass(frozen=True)
class StoredLayers:
    """Which layers of a network are stored in fewer bits. kind: one of `FORMATS`, of all of them."""

    kind: str
    paths: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module) -> StoredLayers | None:
        """Return those of a module; None where it has none."""
        layers = quantised_layers(module)
        return cls(next(iter(layers.values())).kind, frozenset(layers)) if layers else None

    def read(
        self, network: NetworkFiles, dtype: torch.dtype, device: str | torch.device, how: NetworkRead | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a denoiser or a text encoder, by their names in the module.

        Files of 8 bits keep theirs as fp8, if there is a scale for each row or one for the whole weight, and nothing
        is merged; all others are dequantised, and quantised as the weights of other files are.

        Args:
            dtype: of all other weights, to which these are rounded before they are quantised, too.
            how: how weights are read that are not just those in the files.
        Raises:
            ConfigError: a file cannot be read, or as `how` does.
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
                # Copied, because it may be the memory of a file.
                yield from self._stored(name, weights[name].to(device, dtype, copy=True))
            else:
                codes, scale = (tensor.to(device, copy=True) for tensor in kept)
                yield from ((f"{path}.codes", codes), (f"{path}.scale", scale))

    def _layer(self, name: str) -> str | None:
        """Return the path of the layer whose weight goes by a name."""
        path, _, leaf = name.rpartition(".")
        return path if leaf == "weight" and path in self.paths else None

    def _stored(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        path = self._layer(name)
        if path is None:
            yield name, weight
        else:
            yield from zip((f"{path}.codes", f"{path}.scale"), FORMATS[self.kind].quantise(weight), strict=True)
