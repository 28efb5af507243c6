"""Base class of all settings, and the settings that several packages share."""

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
# From the fastest to the one that needs the least memory.
CHECKPOINTING: tuple[GradientCheckpointing, ...] = get_args(GradientCheckpointing)
BackpropStrategy: TypeAlias = Literal["tail", "last", "random", "uniform", "steps"]
Sharding: TypeAlias = Literal["ddp", "zero2", "zero3", "fsdp"]
Quantization: TypeAlias = Literal["none", "int8", "fp8", "nf4"]
AUTO: Literal["auto"] = "auto"
# In a plan: all stages that the plan does not name.
OTHERS = "*"


# Settings of PEFT's LoraConfig, transformers' TrainingArguments and others whose name in frostline is not similar.
_NAMES_OF_OTHERS = {
    "r": "lora.rank",
    "lr": "train.learning_rate",
    "bf16": "train.mixed_precision",
    "fp16": "train.mixed_precision",
    "save_steps": "train.checkpointing_steps",
    "eval_steps": "validation.steps",
    "train_dataset": "data.source",
    # The former setting for several rewards.
    "plus": "rewards",
}
# The context of pydantic's error for an invalid path.
_NO_PATH = {"class": "Path"}

# Settings that contain a path, or end in one.
_NAMES_WITH_PATHS = ("model", "detector", "embedder")


class Settings(BaseModel):
    """Base class of all settings. Immutable; rejects unknown keys, non-finite numbers and wrong types."""

    # Strict: otherwise `no` becomes the number 0, and `yes` becomes 1.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _what_is_left_empty_has_its_default(cls, values: Any) -> Any:
        """Remove null sections, lists and mappings: in YAML, a section whose entries are all commented out is null."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or not cls._is_compound(name)}

    @field_validator("*", mode="before")
    @classmethod
    def _as_files_have_it(cls, value: Any, info: ValidationInfo) -> Any:
        """Convert lists to tuples and text to paths: files and command-line flags have neither type."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = (annotation, *get_args(annotation))
        if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
            return tuple(value)
        return Path(value) if isinstance(value, str) and Path in kinds else value

    @classmethod
    def _is_compound(cls, name: Any) -> bool:
        """Return whether a field contains settings, a list or a mapping, and does not accept null."""
        field = cls.model_fields.get(name) if isinstance(name, str) else None
        if field is None or type(None) in get_args(field.annotation):
            return False
        return get_origin(field.annotation) in (tuple, dict) or nested_settings(cls, name) is not None

    @field_validator("*", mode="after")
    @classmethod
    def _expand_home(cls, value: Any, field: ValidationInfo) -> Any:
        """Expand `~` to the home folder, also after a prefix such as `scrfd:`."""
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
        """Return the class that validates `values`; subclasses may choose a more specific class."""
        return cls

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Create settings from plain values.

        Raises:
            ConfigError: a setting is unknown (the message suggests the nearest name), missing or invalid.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_explain(cls, values, dict(problem)) for problem in error.errors()]
            raise ConfigError("; ".join(problems)) from None


class LoraSettings(Settings):
    """Settings of the LoRA on the denoiser, or on the selected experts of a model with two denoisers."""

    rank: int = Field(default=32, ge=1, description="rank r of the matrices A and B")
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="scaling numerator: the LoRA output is scaled by alpha / rank; equals rank if not given",
    )
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="names of the adapted layers; all attention and feed-forward layers if not given",
    )
    experts: Experts = Field(
        default="low",
        description="experts with a LoRA, in a model with two: low (low noise levels), high, or both (one LoRA each)",
    )

    def has_lora(self, expert: ExpertName) -> bool:
        """Return whether `expert` has a LoRA; the only denoiser of a model without experts is `low`."""
        return self.experts in (expert, "both")

    def check_experts(self, two_experts: bool) -> None:
        """Check that the model has the selected experts.

        Raises:
            ConfigError: the model has one denoiser, and `experts` is not `low`.
        """
        if not two_experts and self.experts != "low":
            raise ConfigError(f"lora.experts: {self.experts}: this model has one expert; remove the setting or use low")


class BaseAdapter(Settings):
    """An adapter that is merged into the denoiser in memory when the model is loaded."""

    path: Path = Field(
        description="LoRA in any supported format: a PEFT folder or a .safetensors file, which may contain "
        "diff and diff_b"
    )
    scale: float = Field(default=1.0, description="scale of the adapter; 1 is the scale it was trained with")
    expert: ExpertName | None = Field(
        default=None,
        description="expert that the adapter is for, in a model with two (by noise level); not given for other models",
    )

    @classmethod
    def parse_all(cls, entries: Iterable[BaseAdapter | Mapping[str, Any]]) -> tuple[BaseAdapter, ...]:
        """Parse the entries that are not `BaseAdapter` objects yet.

        Raises:
            ConfigError: see `parse`.
        """
        return tuple(entry if isinstance(entry, BaseAdapter) else cls.parse(dict(entry)) for entry in entries)


class QuantizationSettings(Settings):
    """Storage format of frozen weights, independent of the compute precision."""

    quantization: Quantization = Field(
        default="none",
        description="quantization of the frozen linear layers in the denoiser blocks: none, int8, fp8 or nf4",
    )
    text_encoder_quantization: Quantization = Field(
        default="none",
        description="quantization of the frozen linear layers in the text encoder: none, int8, fp8 or nf4",
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
    # Do not suggest a setting of another list entry.
    entries = next((f"{'.'.join(parents[:i])}." for i, part in enumerate(parents) if isinstance(part, int)), None)
    return f"{where}: unknown setting, {_suggestion(str(key), section, root, entries)}"


def _given(problem: dict[str, Any]) -> str:
    """Return text with the given value, if its type is wrong; otherwise an empty string."""
    value = problem["input"]
    if not problem["type"].endswith(("_type", "is_instance_of")) or isinstance(value, dict | list | tuple):
        return ""
    switch = " (unquoted yes, no, on and off are Booleans)" if isinstance(value, bool) else ""
    return f", not {json.dumps(value, default=repr)[:80]}{switch}"


def _suggestion(key: str, section: type[Settings], root: type[Settings], but: str | None) -> str:
    """Suggest the nearest name in the same section, or the same name in another section.

    Args:
        but: prefix of the names not to suggest.
    """
    names = [name for name in dotted_names(root) if but is None or not name.startswith(but)]
    # If several sections have the name, suggest the first.
    elsewhere = {name.rpartition(".")[2]: name for name in reversed(names)}
    if key in elsewhere:
        return f"did you mean {elsewhere[key]}?"
    if (name := _NAMES_OF_OTHERS.get(key)) in elsewhere.values():
        return f"did you mean {name}?"
    close = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.5)
    if not close:
        close = [elsewhere[name] for name in difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.75)]
    return f"did you mean {close[0]}?" if close else f"valid settings: {', '.join(section.model_fields)}"


def nested_settings(settings: type[Settings], field: str) -> type[Settings] | None:
    """Return the settings class that a field contains (directly, in a union or in a tuple); None for a plain value."""
    annotation = settings.model_fields[field].annotation
    for part in (annotation, *get_args(annotation)):
        part = get_args(part)[0] if get_origin(part) is Annotated else part
        if isinstance(part, type) and issubclass(part, Settings):
            return part
    return None


def dotted_names(settings: type[Settings], prefix: str = "") -> Iterator[str]:
    """Yield all settings as `section.name`. For a list of sections, yield the list and the settings of its default
    entries.
    """
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
