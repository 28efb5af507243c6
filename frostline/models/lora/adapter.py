"""What an adapter is in memory: low-rank pairs for layers, and differences of whole parameters."""

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

    down: A, (rank, in); up: B, (out, rank). Of a convolution A has its kernel, and B one of single elements.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight that it changes."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """Return the update in fp32, of the weight's shape."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (self.scale * product).reshape(self.weight_shape)


@dataclass(frozen=True)
class UniformLora:
    """A LoRA of one rank and one alpha on linear layers: each computes `W x + alpha / rank * B A x`.

    layers: by module path in diffsynth's `WanModel`, A (rank, in) and B (out, rank). path: the file that they are from.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    rank: int
    alpha: float
    path: Path

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names by which PEFT finds exactly these layers, however many blocks a model has: their whole paths."""
        return tuple(sorted(self.layers))


@dataclass(frozen=True)
class Adapter:
    """An adapter of the denoiser as it was read.

    layers: by module path in diffsynth's `WanModel`. differences: what is added to whole parameters, by their names
    there (`blocks.0.self_attn.q.bias`, `blocks.0.modulation`, …), as in distilled models. path: the file they are from.
    """

    layers: Mapping[str, LoraPair] = field(repr=False)
    path: Path
    differences: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def uniform(self) -> UniformLora:
        """Return the same update with one rank and one alpha for all layers, as sampling and training need it.

        Lower ranks are filled up with zeros; where the scales differ, they are multiplied into B, in fp32.

        Raises:
            ConfigError: it has differences, or changes a convolution.
        """
        if self.differences:
            raise ConfigError(
                f"{self.path} has differences of {len(self.differences)} whole parameters beside its LoRA, the first "
                f"of {min(self.differences)}: name it in base_adapters, or merge it into the model (frostline adapter "
                "merge), and take that model"
            )
        for layer, pair in self.layers.items():
            if pair.down.ndim != 2:
                raise ConfigError(
                    f"{self.path} changes {layer}, a convolution: name it in base_adapters, or merge it into the model "
                    f"(frostline adapter merge), and take that model"
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
    """Return whether no element is NaN or infinite, of any floating-point type."""
    # There is no such function on 8 bits.
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())
