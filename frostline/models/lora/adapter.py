"""Adapters in memory: low-rank pairs for layers, and differences of whole parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from frostline.errors import ConfigError


@dataclass(frozen=True)
class LoraPair:
    """The update `alpha / rank * B A` of one weight.

    Attributes:
        down: A, (rank, in); for a convolution, with its kernel.
        up: B, (out, rank); for a convolution, with a kernel of size 1.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Return `alpha / rank`."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Return the shape of the weight that the pair changes."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """Return the update in fp32, with the shape of the weight."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (self.scale * product).reshape(self.weight_shape)


@dataclass(frozen=True)
class UniformLora:
    """A LoRA with one rank and one alpha on linear layers: each computes `W x + alpha / rank * B A x`.

    Attributes:
        layers: A (rank, in) and B (out, rank), by module path in diffsynth's `WanModel`.
        path: the file of the adapter.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    rank: int
    alpha: float
    path: Path

    @property
    def scale(self) -> float:
        """Return `alpha / rank`."""
        return self.alpha / self.rank

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Return the full paths of the layers, so that PEFT adapts exactly these layers."""
        return tuple(sorted(self.layers))


@dataclass(frozen=True)
class Adapter:
    """An adapter of the denoiser as it was read.

    Attributes:
        layers: by module path in diffsynth's `WanModel`.
        differences: values to add to whole parameters, by their names there (`blocks.0.self_attn.q.bias`,
            `blocks.0.modulation`, …), as in distilled models.
        path: the file of the adapter.
    """

    layers: Mapping[str, LoraPair] = field(repr=False)
    path: Path
    differences: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def uniform(self) -> UniformLora:
        """Return the same update with one rank and one alpha for all layers, for sampling and training.

        Lower ranks are padded with zeros. If the scales differ, they are multiplied into B, in fp32.

        Raises:
            ConfigError: the adapter has differences, or changes a convolution.
        """
        if self.differences:
            raise ConfigError(
                f"{self.path} has differences of {len(self.differences)} whole parameters besides its "
                f"LoRA, the first of {min(self.differences)}: use base_adapters, or merge it into the "
                "model (frostline adapter merge) and use the merged model"
            )
        for layer, pair in self.layers.items():
            if pair.down.ndim != 2:
                raise ConfigError(
                    f"{self.path} changes {layer}, a convolution: use base_adapters, or merge it into the "
                    "model (frostline adapter merge) and use the merged model"
                )
        rank, scales = max(pair.rank for pair in self.layers.values()), {pair.scale for pair in self.layers.values()}
        fold = len(scales) > 1
        layers = {layer: _of_rank(pair, rank, fold=fold) for layer, pair in self.layers.items()}
        alpha = float(rank) if fold else next(pair.alpha for pair in self.layers.values() if pair.rank == rank)
        return UniformLora(layers, rank, alpha, self.path)


def _of_rank(pair: LoraPair, rank: int, *, fold: bool) -> tuple[Tensor, Tensor]:
    missing = rank - pair.rank
    up = pair.scale * pair.up.float() if fold else pair.up
    if not missing:
        return pair.down, up
    return F.pad(pair.down.float(), (0, 0, 0, missing)), F.pad(up.float(), (0, missing))


def is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite, for any floating-point dtype."""
    # `torch.isfinite` does not support 8-bit dtypes.
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())
