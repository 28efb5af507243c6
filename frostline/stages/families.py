"""The model families: packages in this folder, each with a module `family` that has the functions of `Family`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import frostline.stages
from frostline.config import NOT_QUANTISED
from frostline.errors import ConfigError
from frostline.models.video_shape import Geometry
from frostline.models.wan.video_shape import GEOMETRY as DEFAULT_GEOMETRY

if TYPE_CHECKING:
    import torch

    from frostline.config import BaseAdapter, LoraSettings, QuantizationSettings
    from frostline.experts import ExpertName
    from frostline.models.lora import Adapter
    from frostline.stages.video_model import VideoModel

# The family of models that no other family recognises: it reports their errors. Its geometry is `DEFAULT_GEOMETRY`.
_DEFAULT = "wan"


class ModelSpec(Protocol):
    """A model without its weights.

    two_experts: whether it has a denoiser for high noise levels of its own. needs_image: whether it generates from a
    first frame. from_files: whether the sizes are those of files; False where they are of the release that the model
    is named after.
    """

    @property
    def name(self) -> str: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def boundary(self) -> float: ...
    @property
    def two_experts(self) -> bool: ...
    @property
    def needs_image(self) -> bool: ...
    @property
    def from_files(self) -> bool: ...


class Family(Protocol):
    """What a family's module `family` contains; importing it imports no torch.

    GEOMETRY: the weakest demands on videos that any of its models has. STAGES: names of all stages that one may have.
    FROZEN_STAGES: of those, the stages that carry no gradient, unless it is an expert that has a LoRA.
    LORA_TARGETS: names of the layers that a LoRA adapts unless it is told otherwise. PACKAGES: whose code its networks
    are, other than torch.
    """

    __name__: str
    GEOMETRY: Geometry
    STAGES: tuple[str, ...]
    FROZEN_STAGES: tuple[str, ...]
    LORA_TARGETS: tuple[str, ...]
    PACKAGES: tuple[str, ...]

    def recognises(self, model: object) -> bool:
        """Return whether a name, folder or list of files is a model of the family, or `model` such components."""
        ...

    def read_spec(self, model: str | Path) -> ModelSpec:
        """Return a model's sizes from its files; no weights are read.

        Raises:
            ConfigError: the files do not make a model.
        """
        ...

    def trained_video(self, model: str | Path) -> tuple[int, int, int] | None:
        """Return frames, height and width that a model was trained at; None where no one size is known."""
        ...

    def files(self, model: str | Path) -> Sequence[Path]:
        """Return all files that a model is loaded from.

        Raises:
            ConfigError: they do not make a model.
        """
        ...

    def check_files(self, model: str | Path) -> None:
        """Raise what `load` would raise, as far as can be told without reading weights."""
        ...

    def check_lora(self, model: str | Path, lora: LoraSettings) -> None:
        """Raise a ConfigError where the LoRA's target modules are not those of linear layers."""
        ...

    def layer_path(self, name: str, *, flat: bool = False) -> str | None:
        """Return the path of a layer in the denoiser by its name in adapter files; see `LayerPath`."""
        ...

    def diffusers_path(self, layer: str) -> str | None:
        """Return the path in diffusers of a layer of the denoiser; None if diffusers does not have it."""
        ...

    def check_adapter(self, model: str | Path, adapter: Adapter, expert: ExpertName) -> None:
        """Raise a ConfigError where an adapter is of another model.

        Args:
            expert: of two, one that the model has; `low` is also the only denoiser of a model with one.
        """
        ...

    def merge_adapter(
        self, model: str | Path, adapter: Adapter, expert: ExpertName, lora_scale: float, dtype: torch.dtype | None
    ) -> Mapping[str, torch.Tensor]:
        """Return the weights of a denoiser, with an adapter merged, by their names there.

        Args:
            expert: as for `check_adapter`.
            dtype: type of the weights; None keeps their types, and computes weights of 8 bits in that of the others.
        Raises:
            ConfigError: the adapter is of another model, or a merged weight is not finite.
        """
        ...

    def check_base_adapters(self, model: str | Path, adapters: Sequence[BaseAdapter]) -> None:
        """Raise a ConfigError where an adapter cannot be read, is of another model, or names no expert of it."""
        ...

    def load(
        self,
        model: Any,
        dtype: torch.dtype,
        device: torch.device,
        defer: bool,
        base_adapters: Sequence[BaseAdapter] = (),
        live: bool = True,
        quantization: QuantizationSettings = NOT_QUANTISED,
    ) -> Any:
        """Load a model, frozen, in eval mode: its components.

        Args:
            defer: leave on disk until they are needed the weights that an engine may serve.
            base_adapters: merged into the denoisers whenever these are read, as `merge_adapter` does.
            live: whether parts that training computes with a gradient are needed, too; where they are not, a family may
                leave them without weights.
            quantization: how linear layers of denoisers and text encoder are stored, each quantised as it is read.
        Raises:
            ConfigError: says which file does not fit.
        """
        ...

    def video_model(self, components: Any, lora: LoraSettings | None) -> VideoModel:
        """Return loaded components as a `VideoModel`, with a LoRA injected in place, or without one."""
        ...

    def empty_model(
        self, spec: Any, dtype: torch.dtype, lora: LoraSettings, quantization: QuantizationSettings = NOT_QUANTISED
    ) -> VideoModel:
        """Return a model whose parameters are on the meta device."""
        ...


__all__ = ["DEFAULT_GEOMETRY", "Family", "ModelSpec", "all_stages", "check_adapters", "default_family", "family_of"]


def family_of(model: str | Path | Sequence[object] | object) -> Family:
    """Return the family of a model: the first that recognises it.

    Args:
        model: the name of a built-in model, a folder, a list of files, or what `Family.load` returned.
    """
    return next((family for family in _families() if family.recognises(model)), default_family())


def check_adapters(model: str | Path, adapters: Mapping[ExpertName, Adapter]) -> None:
    """Check that a model has the experts that adapters are for, and that these are of the model.

    Raises:
        ConfigError: it has not, or one is of another model.
    """
    family = family_of(model)
    if "high" in adapters and not family.read_spec(model).two_experts:
        raise ConfigError(f"{adapters['high'].path} is for the high-noise expert of two, and {model} has one expert")
    for expert, adapter in adapters.items():
        family.check_adapter(model, adapter, expert)


def default_family() -> Family:
    """Return the family of a model that no other family recognises."""
    return _family(_DEFAULT)


def all_stages() -> tuple[str, ...]:
    """Return the names of the stages of all families, each once."""
    return tuple(dict.fromkeys(stage for family in (default_family(), *_families()) for stage in family.STAGES))


def _families() -> Iterator[Family]:
    for package in pkgutil.iter_modules(frostline.stages.__path__):
        if package.ispkg and package.name != _DEFAULT:
            yield _family(package.name)


def _family(name: str) -> Family:
    return cast(Family, importlib.import_module(f"{frostline.stages.__name__}.{name}.family"))
