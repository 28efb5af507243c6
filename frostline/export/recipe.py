"""Export recipes: model, stages, backends, precision and shapes, as YAML files in `frostline/recipes/export/`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from frostline.config import BaseAdapter, LoraSettings, Precision, QuantizationSettings
from frostline.errors import ConfigError, EngineError
from frostline.experts import Experts
from frostline.recipes import export_recipe
from frostline.rewards.config import RewardEntry, default_rewards, stage_names
from frostline.runtime.backends import DEFAULT_BACKEND, TORCH, check_backend, get_backend
from frostline.runtime.backends.base.options import BuildOptions
from frostline.stages.families import family_of
from frostline.stages.shapes import ShapeRange, asked_maximum, parse_shapes

if TYPE_CHECKING:
    import torch

ALL_STAGES = "all"
_CAPABILITY = re.compile(r"\d{1,2}\.\d")


class Recipe(QuantizationSettings):
    """Settings of an export of one model; command-line flags override them."""

    model: str = Field(
        description="tiny, tiny-moe, tiny-ti2v, or the folder of a Wan checkpoint; empty for stages of rewards only"
    )
    stages: tuple[str, ...] = Field(default=(ALL_STAGES,), description="stages to export, or all")
    backends: tuple[str, ...] = Field(
        default=(DEFAULT_BACKEND,),
        description="backends to build engines for; each stage uses those that support its precision",
    )
    precision: Precision = Field(default="fp32", description="floating-point type of the Wan stages")
    compute_capabilities: tuple[str, ...] = Field(
        default=(), description="GPUs to build TensorRT engines for: compute capabilities such as 8.9, or current"
    )
    min_shapes: str = Field(default="", description="minimum shapes, in trtexec syntax, such as video:1x5x3x64x64")
    opt_shapes: str = Field(default="", description="shapes to optimise for, in trtexec syntax")
    max_shapes: str = Field(default="", description="maximum shapes, in trtexec syntax")
    base_adapters: tuple[BaseAdapter, ...] = Field(
        default=(), description="adapters to merge into the denoiser when the model is loaded, as in training"
    )
    lora: LoraSettings | None = Field(
        default=LoraSettings(), description="LoRA whose matrices are inputs of the denoiser engine; null for none"
    )
    rewards: tuple[SerializeAsAny[RewardEntry], ...] = Field(
        default_factory=default_rewards, description="rewards whose stages are also exported, each by its type"
    )

    @field_validator("stages", "backends", "compute_capabilities", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Split text such as `a,b` into a list."""
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("compute_capabilities", mode="before")
    @classmethod
    def _written_as_numbers(cls, value: Any) -> Any:
        """Convert numbers to text: in YAML, `[8.9, 12.0]` are numbers."""
        if not isinstance(value, list | tuple | float):
            return value
        parts = [value] if isinstance(value, float) else value
        return tuple(repr(part) if isinstance(part, float) else part for part in parts)

    @field_validator("stages", "backends")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("empty list: nothing to export")
        return value

    @field_validator("compute_capabilities")
    @classmethod
    def _are_capabilities(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name != "current" and not _CAPABILITY.fullmatch(name):
                digits = re.sub(r"\D", "", name)
                example = f"{digits[:-1]}.{digits[-1]}" if len(digits) in (2, 3) else "8.9"
                raise ValueError(f"{name!r} is not a compute capability: use a value such as {example}, or current")
        return value

    @model_validator(mode="after")
    def _stages_are_known(self) -> Self:
        of_rewards = stage_names(self.rewards)
        if of_rewards is not None:
            known = (*(family_of(self.model).STAGES if self.model else ()), *of_rewards)
            for name in self.stages:
                if name not in (ALL_STAGES, *known):
                    raise ValueError(f"stages: there is no stage {name!r}; valid stages: {', '.join(known) or 'none'}")
        if not self.model and ALL_STAGES in self.stages:
            raise ValueError("model is empty: set stages to the names of stages of rewards, not to all")
        return self

    @model_validator(mode="after")
    def _can_be_exported(self) -> Self:
        """Check shapes and names of backends before a model is loaded, which takes seconds or minutes."""
        _ = self.shapes
        for backend in self.backends:
            if backend == TORCH:
                raise ValueError("backends: torch needs no engine: leave it out")
            check_backend(backend)
        return self

    def check(self, device: str) -> None:
        """Check the recipe against this installation, before its model is loaded.

        Raises:
            ConfigError: a backend is not installed or does not build for the requested GPUs; the LoRA's rank is out of
                the range that engines support; or a base adapter is for another model.
        """
        if not self.of_rewards_alone:
            family_of(self.model).check_base_adapters(self.model, self.base_adapters)
        low, _, high = self.shapes.rank
        if self.lora is not None and not low <= self.lora.rank <= high and self._adapted & {*self.stages}:
            raise ConfigError(
                f"lora.rank: {self.lora.rank} is out of the range that engines support, {low} to "
                f"{high}: choose another rank, or export with --no-live-lora"
            )
        for name in self.backends:
            if reason := get_backend(name).unavailable():
                raise ConfigError(f"backend {name}: {reason}")
            self._check_target(name, device)

    def _check_target(self, name: str, device: str) -> None:
        from frostline.runtime.device import resolve_device

        backend, options = get_backend(name), BuildOptions(compute_capabilities=self.compute_capabilities)
        try:
            backend.check_target(backend.target(resolve_device(device), options))
        except EngineError as error:
            raise ConfigError(f"backend {name}: {error}") from error

    @property
    def of_rewards_alone(self) -> bool:
        """Return whether only stages of rewards are exported, for which no model is loaded."""
        known = stage_names(self.rewards)
        return not self.model or (known is not None and {*self.stages} <= {*known})

    @property
    def shapes(self) -> ShapeRange:
        """Return the range of shapes.

        Raises:
            ConfigError: a shape string is invalid.
        """
        geometry = family_of(self.model).GEOMETRY
        return parse_shapes(self.min_shapes, self.opt_shapes, self.max_shapes, geometry)

    @property
    def asked_maximum(self) -> frozenset[str]:
        """Return the dynamic dimensions whose maximum the recipe sets."""
        return asked_maximum(self.max_shapes, family_of(self.model).GEOMETRY)

    def backends_for(self, precision: str) -> tuple[str, ...]:
        """Return the backends that support a precision; all if none does, so that the build reports the error."""
        able = tuple(name for name in self.backends if precision in get_backend(name).precisions)
        return able or self.backends

    @property
    def _adapted(self) -> set[str]:
        """Return the stages with a LoRA, by all names that a recipe may use for them."""
        lora = self.lora or LoraSettings()
        adapted = {"denoiser": lora.has_lora("low"), "denoiser_high_noise": lora.has_lora("high")}
        return {ALL_STAGES, *(stage for stage, has_lora in adapted.items() if has_lora)}

    def with_lora(self, live: bool, target_modules: str | None, experts: Experts | None = None) -> Recipe:
        """Return this recipe with a live LoRA on other layers (comma-separated) or experts, or without a LoRA."""
        if not live:
            return self.model_copy(update={"lora": None})
        changes: dict[str, Any] = {} if experts is None else {"experts": experts}
        if target_modules is not None:
            changes["target_modules"] = [name.strip() for name in target_modules.split(",") if name.strip()]
        if not changes:
            return self
        lora = LoraSettings.parse({**(self.lora or LoraSettings()).model_dump(), **changes})
        return self.model_copy(update={"lora": lora})

    @property
    def dtype(self) -> torch.dtype:
        """Return the floating-point type for `precision`."""
        from frostline.models.precision import DTYPES

        return DTYPES[self.precision]


def reward_recipe(rewards: Sequence[RewardEntry], changes: dict[str, Any]) -> Recipe:
    """Return a recipe of rewards without a model: all of their stages, unless `changes` selects some.

    Raises:
        ConfigError: a reward or a field is invalid, or the rewards have no stages.
    """
    stages = stage_names(rewards)
    if stages is None:
        from frostline.rewards.build import resolve

        stages = stage_names(resolve(rewards))
    if not stages:
        raise ConfigError("these rewards have no stages: there is nothing to export")
    given = {name: value for name, value in changes.items() if value is not None}
    return Recipe.parse({"model": "", "stages": stages, "rewards": tuple(rewards), **given})


def load_recipe(model: str, changes: dict[str, Any]) -> Recipe:
    """Return the recipe that `model` names, with `changes` applied.

    Args:
        model: a `.yaml` file, a name known to `frostline init`, or a model, which gets the default recipe.
        changes: fields of `Recipe`; fields that are None have no effect.
    Raises:
        ConfigError: the file or a field is invalid.
    """
    path = _find(model)
    values: dict[str, Any] = {"model": model}
    if path is not None:
        values = _read(path)
    values.update({name: value for name, value in changes.items() if value is not None})
    return Recipe.parse(values)


def _find(model: str) -> Path | None:
    given = Path(model)
    if given.suffix in (".yaml", ".yml"):
        if not given.is_file():
            raise ConfigError(f"recipe {given} does not exist")
        return given
    return export_recipe(model)


def _read(path: Path) -> dict[str, Any]:
    # Imported here, because the command line imports this module for the options of `frostline export`, and should not
    # import PyYAML.
    from frostline.documents import read_named_yaml

    values = read_named_yaml(path, f"recipe {path}")
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path} must be a mapping of settings")
    return values
