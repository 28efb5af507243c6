"""Settings, validated: the base of all of them, and those that several rooms share."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from frostline.errors import ConfigError
from frostline.experts import ExpertName, Experts

Precision: TypeAlias = Literal["fp32", "fp16", "bf16"]
GradientCheckpointing: TypeAlias = Literal["none", "block", "full"]
# From the fastest to the smallest.
CHECKPOINTING: tuple[GradientCheckpointing, ...] = get_args(GradientCheckpointing)
BackpropStrategy: TypeAlias = Literal["tail", "last", "random", "uniform", "steps"]
Sharding: TypeAlias = Literal["ddp", "zero2", "zero3", "fsdp"]
Quantization: TypeAlias = Literal["none", "int8", "fp8", "nf4"]
AUTO: Literal["auto"] = "auto"
# In a plan, the stages that it does not name.
OTHERS = "*"


# What PEFT's LoraConfig, transformers' TrainingArguments and others call a setting whose name here does not look alike.
_NAMES_OF_OTHERS = {
    "r": "lora.rank",
    "lr": "train.learning_rate",
    "bf16": "train.mixed_precision",
    "fp16": "train.mixed_precision",
    "save_steps": "train.checkpointing_steps",
    "eval_steps": "validation.steps",
    "train_dataset": "data.source",
    # Of more than one reward.
    "plus": "rewards",
}
# What pydantic says of what should be a path.
_NO_PATH = {"class": "Path"}

# Text that may be, or end in, a path.
_NAMES_WITH_PATHS = ("model", "detector", "embedder")


class Settings(BaseModel):
    """Base of all settings: immutable; unknown keys, numbers that are not finite and values of another type refused."""

    # Strict: `no` would be taken for the number 0, and `yes` for 1.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _what_is_left_empty_has_its_default(cls, values: Any) -> Any:
        """A section, list or mapping all of whose entries are commented out is null in YAML."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or not cls._is_compound(name)}

    @field_validator("*", mode="before")
    @classmethod
    def _as_files_have_it(cls, value: Any, info: ValidationInfo) -> Any:
        """Lists stand for tuples, and text for paths: files and flags have neither."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = (annotation, *get_args(annotation))
        if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
            return tuple(value)
        return Path(value) if isinstance(value, str) and Path in kinds else value

    @classmethod
    def _is_compound(cls, name: Any) -> bool:
        """Whether a field holds settings, a list or a mapping, and may not be null."""
        field = cls.model_fields.get(name) if isinstance(name, str) else None
        if field is None or type(None) in get_args(field.annotation):
            return False
        return get_origin(field.annotation) in (tuple, dict) or nested_settings(cls, name) is not None

    @field_validator("*", mode="after")
    @classmethod
    def _expand_home(cls, value: Any, field: ValidationInfo) -> Any:
        """Let `~` in a path be the home folder, as a shell does, also behind `scrfd:` and the like."""
        try:
            if isinstance(value, Path):
                return value.expanduser()
            if field.field_name in _NAMES_WITH_PATHS and isinstance(value, str) and "~" in value:
                kind, colon, path = value.rpartition(":")
                return f"{kind}{colon}{Path(path).expanduser()}" if path.startswith("~") else value
        except RuntimeError as error:
            raise ValueError(f"{value}: {error}") from None
        return value

    @classmethod
    def for_values(cls, values: Any) -> type[Settings]:
        """The class that validates these values: this one, unless it leaves that to one of them."""
        return cls

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Build from plain values.

        Raises:
            ConfigError: names each setting that is unknown (and the nearest known name) or out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_explain(cls, values, dict(problem)) for problem in error.errors()]
            raise ConfigError("; ".join(problems)) from None


class LoraSettings(Settings):
    """The adapter on the denoiser; of two denoisers on the experts that are named."""

    rank: int = Field(default=32, ge=1, description="inner dimension r of B A")
    alpha: float | None = Field(default=None, gt=0, description="the scale is alpha / rank; alpha = rank if not given")
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="names of the adapted layers; the attention and feed-forward layers of all blocks if not given",
    )
    experts: Experts = Field(
        default="low",
        description="of two experts, those with a LoRA: low (low noise levels), high, or both, each with its own",
    )

    def has_lora(self, expert: ExpertName) -> bool:
        """Return whether an expert of two has a LoRA; `low` is also the only denoiser of a model with one."""
        return self.experts in (expert, "both")

    def check_experts(self, two_experts: bool) -> None:
        """Check that a model has the experts that are named.

        Raises:
            ConfigError: the model has one expert, and another is named.
        """
        if not two_experts and self.experts != "low":
            raise ConfigError(f"lora.experts: {self.experts}: this model has one expert: leave the setting out (low)")


class BaseAdapter(Settings):
    """An adapter that is merged into the denoiser as the model is loaded, in memory alone."""

    path: Path = Field(description="LoRA of any program: a PEFT folder or a .safetensors file; diff and diff_b, too")
    scale: float = Field(default=1.0, description="strength of the adapter; 1 is as trained")
    expert: ExpertName | None = Field(
        default=None, description="of two experts the one that it is for, by noise level; left out where there is one"
    )

    @classmethod
    def parse_all(cls, entries: Iterable[BaseAdapter | Mapping[str, Any]]) -> tuple[BaseAdapter, ...]:
        """Build each that is not built yet from plain values.

        Raises:
            ConfigError: as `parse`.
        """
        return tuple(entry if isinstance(entry, BaseAdapter) else cls.parse(dict(entry)) for entry in entries)


class QuantizationSettings(Settings):
    """How frozen weights are stored, whatever the type that they compute in."""

    quantization: Quantization = Field(
        default="none",
        description="store the frozen linear layers of the denoisers' blocks in 8 or 4 bits: none, int8, fp8 or nf4",
    )
    text_encoder_quantization: Quantization = Field(
        default="none", description="store those of the text encoder in 8 or 4 bits: none, int8, fp8 or nf4"
    )


NOT_QUANTISED = QuantizationSettings()


def _explain(root: type[Settings], values: Any, problem: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        what = "Input should be text that names a path" if problem.get("ctx") == _NO_PATH else problem["msg"]
        what = what.removeprefix("Value error, ").replace("a valid tuple", "a list")
        return f"{where or 'settings'}: {what}{_given(problem)}"
    *parents, key = problem["loc"]
    section = root
    for parent in parents:
        values = values[parent]
        if isinstance(parent, str):
            section = nested_settings(section, parent) or section
        section = section.for_values(values)
    # One entry of a list is no place for what another one has.
    entries = next((f"{'.'.join(parents[:i])}." for i, part in enumerate(parents) if isinstance(part, int)), None)
    return f"{where}: unknown setting, {_suggestion(str(key), section, root, entries)}"


def _given(problem: dict[str, Any]) -> str:
    """What stands there, where it is of another type than it should be."""
    value = problem["input"]
    if not problem["type"].endswith(("_type", "is_instance_of")) or isinstance(value, dict | list | tuple):
        return ""
    switch = " (as yes, no, on and off are read without quotes)" if isinstance(value, bool) else ""
    return f", not {json.dumps(value, default=repr)[:80]}{switch}"


def _suggestion(key: str, section: type[Settings], root: type[Settings], but: str | None) -> str:
    """The nearest name of the same section, or the same name in another one.

    Args:
        but: what the names of no use begin with.
    """
    names = [name for name in dotted_names(root) if but is None or not name.startswith(but)]
    # Where several sections have the name, the first one's stays.
    elsewhere = {name.rpartition(".")[2]: name for name in reversed(names)}
    if key in elsewhere:
        return f"is {elsewhere[key]} meant?"
    if (name := _NAMES_OF_OTHERS.get(key)) in elsewhere.values():
        return f"is {name} meant?"
    close = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.5)
    if not close:
        close = [elsewhere[name] for name in difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.75)]
    return f"is {close[0]} meant?" if close else f"known are {', '.join(section.model_fields)}"


def nested_settings(settings: type[Settings], field: str) -> type[Settings] | None:
    """The settings that a field holds (by itself, as one of a union, or in a tuple), or None for a plain value."""
    annotation = settings.model_fields[field].annotation
    for part in (annotation, *get_args(annotation)):
        part = get_args(part)[0] if get_origin(part) is Annotated else part
        if isinstance(part, type) and issubclass(part, Settings):
            return part
    return None


def dotted_names(settings: type[Settings], prefix: str = "") -> Iterator[str]:
    """All settings, as `section.name`; of a list of sections itself, and what is in those that it has by default."""
    for name, field in settings.model_fields.items():
        nested = nested_settings(settings, name)
        default = field.get_default(call_default_factory=True)
        if nested is None:
            yield prefix + name
        elif isinstance(default, tuple):
            yield prefix + name
            for number, entry in enumerate(default):
                yield from dotted_names(type(entry), f"{prefix}{name}.{number}.")
        else:
            yield from dotted_names(nested, f"{prefix}{name}.")
