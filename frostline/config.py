"""Settings, validated: the base of all of them, and those that several rooms share."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args, get_origin

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

Precision: TypeAlias = Literal["fp32", "fp16", "bf16"]
GradientCheckpointing: TypeAlias = Literal["none", "block", "full"]
# From the fastest to the smallest.
CHECKPOINTING: tuple[GradientCheckpointing, ...] = get_args(GradientCheckpointing)
Sharding: TypeAlias = Literal["ddp", "zero2", "zero3", "fsdp"]
AUTO: Literal["auto"] = "auto"
# In a plan, the stages that it does not name.
OTHERS = "*"
# Of every block: the projections of its attentions, and its feed-forward layers.
TARGET_MODULES = ("q", "k", "v", "o", "ffn.0", "ffn.2")


# What PEFT's LoraConfig and transformers' TrainingArguments call a setting whose name here does not look alike.
_NAMES_OF_OTHERS = {
    "r": "lora.rank",
    "lr": "train.learning_rate",
    "bf16": "train.mixed_precision",
    "fp16": "train.mixed_precision",
    "save_steps": "train.checkpointing_steps",
    "eval_steps": "validation.steps",
    "train_dataset": "data.source",
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
    def parse(cls, values: dict[str, Any]) -> Self:
        """Build from plain values.

        Raises:
            ConfigError: names each setting that is unknown (and the nearest known name) or out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_explain(cls, dict(problem)) for problem in error.errors()]
            raise ConfigError("; ".join(problems)) from None


class LoraSettings(Settings):
    """The adapter on the denoiser (the low-noise expert of two)."""

    rank: int = Field(default=32, ge=1, description="inner dimension r of B A")
    alpha: float | None = Field(default=None, gt=0, description="the scale is alpha / rank; alpha = rank if not given")
    target_modules: tuple[str, ...] = Field(
        default=TARGET_MODULES, min_length=1, description="names of the adapted layers"
    )


FACE_IDENTITY = "face_identity"


class RewardTerm(Settings):
    """One reward: `-(score - baseline) / scale * weight` joins the loss."""

    type: str = Field(
        default=FACE_IDENTITY, description="face_identity, or package.module:Class of a reward (see ARCHITECTURE.md)"
    )
    baseline: float = Field(default=0.54, description="score at which the reward is zero")
    scale: float = Field(default=0.16, gt=0, description="spread of scores that counts as one unit")
    weight: float = Field(default=0.1, ge=0, description="weight of the reward in the loss")
    options: dict[str, Any] = Field(default={}, description="arguments of package.module:Class")
    detector: str = Field(default="mtcnn", description="face_identity: mtcnn, yunet or scrfd:PATH.onnx")
    embedder: str = Field(
        default="sface", description="face_identity: sface, facenet[:TAG or PATH] or arcface:PATH.onnx"
    )
    upscale: int = Field(
        default=1, ge=1, le=8, description="face_identity: enlarge frames this many times before detection"
    )
    min_face_size: int = Field(
        default=20, ge=12, description="face_identity: smallest face that mtcnn looks for, in (enlarged) pixels"
    )
    face: Literal["largest", "best"] = Field(
        default="largest",
        description="face_identity: which of several faces in a generated frame counts: the largest, or the best "
        "likeness of the reference; of a reference it is the largest",
    )
    missing_face: Literal["exclude", "zero"] = Field(
        default="exclude", description="face_identity: frames without a face: left out of the mean, or counted as 0"
    )
    on_no_face: Literal["skip", "zero", "error"] = Field(
        default="skip", description="samples that cannot be scored: no reward, a score of 0, or an error"
    )

    @property
    def is_face_identity(self) -> bool:
        return self.type == FACE_IDENTITY

    @model_validator(mode="after")
    def _fields_go_with_the_type(self) -> Self:
        # Defaults are no fault: a file written from these settings names them all.
        fields = type(self).model_fields
        for name in ("detector", "embedder", "upscale", "min_face_size", "face", "missing_face"):
            if not self.is_face_identity and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is of face_identity only, but type is {self.type}")
        if self.options and self.is_face_identity:
            raise ValueError("options are of a package.module:Class only; face_identity has fields of its own")
        return self


class RewardSettings(RewardTerm):
    """The rewards of a step: one, and what else is added to it."""

    plus: tuple[RewardTerm, ...] = Field(default=(), description="further rewards, each with its own type and weight")

    @property
    def terms(self) -> tuple[RewardTerm, ...]:
        """All rewards; their terms of the loss are added."""
        return (self, *self.plus)

    @property
    def face_identity(self) -> RewardTerm | None:
        """The face-identity reward, if it is one of them."""
        return next((term for term in self.terms if term.is_face_identity), None)

    @model_validator(mode="after")
    def _faces_are_rewarded_once(self) -> Self:
        if sum(term.is_face_identity for term in self.terms) > 1:
            raise ValueError("face_identity can be rewarded once only; give it one weight")
        return self


def _explain(root: type[Settings], problem: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        what = "Input should be text that names a path" if problem.get("ctx") == _NO_PATH else problem["msg"]
        what = what.removeprefix("Value error, ").replace("a valid tuple", "a list")
        return f"{where or 'settings'}: {what}{_given(problem)}"
    *parents, key = problem["loc"]
    section = root
    for parent in parents:
        if isinstance(parent, str):
            section = nested_settings(section, parent) or section
    return f"{where}: unknown setting, {_suggestion(str(key), section, root)}"


def _given(problem: dict[str, Any]) -> str:
    """What stands there, where it is of another type than it should be."""
    value = problem["input"]
    if not problem["type"].endswith(("_type", "is_instance_of")) or isinstance(value, dict | list | tuple):
        return ""
    switch = " (as yes, no, on and off are read without quotes)" if isinstance(value, bool) else ""
    return f", not {json.dumps(value, default=repr)[:80]}{switch}"


def _suggestion(key: str, section: type[Settings], root: type[Settings]) -> str:
    """The nearest name of the same section, or the same name in another one."""
    # Where several sections have the name, the first one's stays.
    elsewhere = {name.rpartition(".")[2]: name for name in reversed([*dotted_names(root)])}
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
        if isinstance(part, type) and issubclass(part, Settings):
            return part
    return None


def dotted_names(settings: type[Settings], prefix: str = "") -> Iterator[str]:
    """All settings that hold a plain value, as `section.name`."""
    for name in settings.model_fields:
        nested = nested_settings(settings, name)
        if nested is None:
            yield prefix + name
        elif nested is not settings and not issubclass(settings, nested):
            yield from dotted_names(nested, f"{prefix}{name}.")
