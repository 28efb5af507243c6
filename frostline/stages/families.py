"""The model families: packages in this folder, each with a module `family` that has the functions of `Family`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import frostline.stages
from frostline.models.video_shape import Geometry
from frostline.models.wan.video_shape import GEOMETRY as DEFAULT_GEOMETRY

if TYPE_CHECKING:
    import torch

    from frostline.config import LoraSettings
    from frostline.models.lora import Adapter
    from frostline.stages.video_model import VideoModel

# The family that says what is wrong with files that none recognises; its demands on videos are `DEFAULT_GEOMETRY`.
_DEFAULT = "wan"


class ModelSpec(Protocol):
    """A model without its weights.

    two_experts: whether it has a denoiser for high noise levels of its own. from_files: whether the sizes are those of
    files; False where they are of the release that the model is named after.
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
    def from_files(self) -> bool: ...


class Family(Protocol):
    """What a family's module `family` contains; importing it imports no torch.

    GEOMETRY: the weakest demands on videos that any of its models has. STAGES: names of all stages that one may have.
    FROZEN_STAGES: of those, the stages that never carry a gradient.
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

    def check_adapter(self, model: str | Path, adapter: Adapter) -> None:
        """Raise a ConfigError where an adapter is of another model."""
        ...

    def load(self, model: Any, dtype: torch.dtype, device: torch.device, defer: bool) -> Any:
        """Load a model, frozen, in eval mode: its components.

        Args:
            defer: leave on disk until they are needed the weights that an engine may serve.
        Raises:
            ConfigError: says which file does not fit.
        """
        ...

    def video_model(self, components: Any, lora: LoraSettings | None) -> VideoModel:
        """Return loaded components as a `VideoModel`, with a LoRA injected in place, or without one."""
        ...

    def empty_model(self, spec: Any, dtype: torch.dtype, lora: LoraSettings) -> VideoModel:
        """Return a model whose parameters are on the meta device."""
        ...


__all__ = ["DEFAULT_GEOMETRY", "Family", "ModelSpec", "all_stages", "family_of"]


def family_of(model: str | Path | Sequence[object] | object) -> Family:
    """Return the family of a model: the first that recognises it.

    Args:
        model: the name of a built-in model, a folder, a list of files, or what `Family.load` returned.
    """
    return next((family for family in _families() if family.recognises(model)), _family(_DEFAULT))


def all_stages() -> tuple[str, ...]:
    """Return the names of the stages of all families, each once."""
    return tuple(dict.fromkeys(stage for family in (_family(_DEFAULT), *_families()) for stage in family.STAGES))


def _families() -> Iterator[Family]:
    for package in pkgutil.iter_modules(frostline.stages.__path__):
        if package.ispkg and package.name != _DEFAULT:
            yield _family(package.name)


def _family(name: str) -> Family:
    return cast(Family, importlib.import_module(f"{frostline.stages.__name__}.{name}.family"))
