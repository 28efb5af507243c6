"""Model families: each is a subpackage with a module `family` that defines the functions of `Family`."""

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

# The family for models that no other family recognises: it reports why a model cannot be loaded. Its geometry is
# `DEFAULT_GEOMETRY`.
_DEFAULT = "wan"


class ModelSpec(Protocol):
    """The sizes of a model, without its weights.

    Attributes:
        two_experts: whether it has a separate denoiser for high noise levels.
        needs_image: whether it generates from a first frame.
        from_files: whether the sizes were read from files; False if they are those of the release with the model's
            name.
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
    """The contents of a family's module `family`. Importing it must not import torch.

    Attributes:
        GEOMETRY: requirements on videos that all of its models have; a single model may require more.
        STAGES: names of all stages that a model may have.
        FROZEN_STAGES: those of STAGES without a gradient, unless the stage is an expert with a LoRA.
        LORA_TARGETS: default names of the layers that a LoRA adapts.
        PACKAGES: packages, other than torch, that contain the code of its networks.
    """

    __name__: str
    GEOMETRY: Geometry
    STAGES: tuple[str, ...]
    FROZEN_STAGES: tuple[str, ...]
    LORA_TARGETS: tuple[str, ...]
    PACKAGES: tuple[str, ...]

    def recognises(self, model: object) -> bool:
        """Return whether a name, a folder, a list of files or loaded components are a model of the family."""
        ...

    def read_spec(self, model: str | Path) -> ModelSpec:
        """Return a model's sizes from its files, without reading weights.

        Raises:
            ConfigError: the files are not a complete model.
        """
        ...

    def trained_video(self, model: str | Path) -> tuple[int, int, int] | None:
        """Return the frames, height and width that a model was trained with; None if they are not known."""
        ...

    def files(self, model: str | Path) -> Sequence[Path]:
        """Return all files that are needed to load a model.

        Raises:
            ConfigError: the files are not a complete model.
        """
        ...

    def check_files(self, model: str | Path) -> None:
        """Raise the errors of `load` that can be detected without reading weights."""
        ...

    def check_lora(self, model: str | Path, lora: LoraSettings) -> None:
        """Raise a ConfigError if the LoRA's target modules are not linear layers of the model."""
        ...

    def layer_path(self, name: str, *, flat: bool = False) -> str | None:
        """Return the path of a layer in the denoiser for its name in adapter files; see `LayerPath`."""
        ...

    def diffusers_path(self, layer: str) -> str | None:
        """Return the diffusers path of a layer of the denoiser; None if diffusers does not have the layer."""
        ...

    def check_adapter(self, model: str | Path, adapter: Adapter, expert: ExpertName) -> None:
        """Raise a ConfigError if an adapter is for another model.

        Args:
            expert: an expert of the model; the only denoiser of a model without experts is `low`.
        """
        ...

    def merge_adapter(
        self, model: str | Path, adapter: Adapter, expert: ExpertName, lora_scale: float, dtype: torch.dtype | None
    ) -> Mapping[str, torch.Tensor]:
        """Return the weights of a denoiser with an adapter merged, by their names in the denoiser.

        Args:
            expert: see `check_adapter`.
            dtype: dtype of the weights; None keeps their dtypes, but in a model with 8-bit weights, all weights get
                the dtype of most other weights.
        Raises:
            ConfigError: the adapter is for another model, or a merged weight is not finite.
        """
        ...

    def check_base_adapters(self, model: str | Path, adapters: Sequence[BaseAdapter]) -> None:
        """Raise a ConfigError if an adapter cannot be read, is for another model, or names a missing expert."""
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
        offload_blocks: int = 0,
    ) -> Any:
        """Load the components of a model, frozen, in eval mode.

        Args:
            model: name of a built-in model, a folder, or a list of files.
            dtype: dtype of all weights that are not quantised.
            defer: leave weights on disk until they are needed, if an engine may replace them.
            base_adapters: merged into the denoisers each time these are read; see `merge_adapter`.
            live: whether the parts that training computes with a gradient are needed; otherwise a family may leave out
                their weights.
            quantization: storage format of the linear layers in denoisers and text encoder, quantised while reading.
            offload_blocks: number of blocks of each denoiser whose weights are kept in main memory; see `BlockOffload`.
        Raises:
            ConfigError: a file does not match; the message names it.
        """
        ...

    def video_model(self, components: Any, lora: LoraSettings | None) -> VideoModel:
        """Return loaded components as a `VideoModel`, with a LoRA injected in place, if given."""
        ...

    def empty_model(
        self, spec: Any, dtype: torch.dtype, lora: LoraSettings, quantization: QuantizationSettings = NOT_QUANTISED
    ) -> VideoModel:
        """Return a model whose parameters are on the meta device."""
        ...


__all__ = ["DEFAULT_GEOMETRY", "Family", "ModelSpec", "all_stages", "check_adapters", "default_family", "family_of"]


def family_of(model: str | Path | Sequence[object] | object) -> Family:
    """Return the family of a model: the first one that recognises it.

    Args:
        model: name of a built-in model, a folder, a list of files, or the return value of `Family.load`.
    """
    return next((family for family in _families() if family.recognises(model)), default_family())


def check_adapters(model: str | Path, adapters: Mapping[ExpertName, Adapter]) -> None:
    """Check that a model has the experts of the adapters, and that the adapters are for this model.

    Raises:
        ConfigError: an expert is missing, or an adapter is for another model.
    """
    family = family_of(model)
    if "high" in adapters and not family.read_spec(model).two_experts:
        raise ConfigError(f"{adapters['high'].path} is for the high-noise expert, but {model} has one expert")
    for expert, adapter in adapters.items():
        family.check_adapter(model, adapter, expert)


def default_family() -> Family:
    """Return the family for models that no other family recognises."""
    return _family(_DEFAULT)


def all_stages() -> tuple[str, ...]:
    """Return the names of the stages of all families, without duplicates."""
    return tuple(dict.fromkeys(stage for family in (default_family(), *_families()) for stage in family.STAGES))


def _families() -> Iterator[Family]:
    for package in pkgutil.iter_modules(frostline.stages.__path__):
        if package.ispkg and package.name != _DEFAULT:
            yield _family(package.name)


def _family(name: str) -> Family:
    return cast(Family, importlib.import_module(f"{frostline.stages.__name__}.{name}.family"))
