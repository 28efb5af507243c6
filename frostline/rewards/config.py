"""Settings of rewards: a list of entries, each validated by the settings class of its `type`.

A type without a colon is the name of a file or folder in this package that defines `Config`. A type with a colon is a
user's class; its module is not imported here, because reading settings must not run user code. torch is not imported
either.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from frostline.config import Settings
from frostline.rewards.frame_selection import ALL, check_selection
from frostline.rewards.inputs import Need
from frostline.stages.provider import Use

if TYPE_CHECKING:
    from frostline.rewards.reward import Reward

OnUnscored = Literal["skip", "zero", "error"]
DEFAULT = "face_identity"
OF_THE_LOSS = frozenset({"weight", "baseline", "scale", "cap"})
"""Settings of any reward that only affect how its score enters the loss."""
_CAP = "maximum score of a sample, above which there is no gain and no gradient; no maximum if not given"
_FRAMES = "generated frames to score: all, first, last, every:N or random:N"
_DEFINES_A_CONFIG = re.compile(r"^class Config\(", re.MULTILINE)


class RewardEntry(Settings):
    """A reward. Its term in the loss is `-(score - baseline) / scale * weight`; the terms of all rewards are added."""

    type: str = Field(
        description="name of a built-in reward (a file or folder in frostline/rewards), or your own class "
        "as package.module:Class"
    )

    @classmethod
    def for_values(cls, values: Any) -> type[RewardEntry]:
        """Return the class that validates an entry with these values, depending on its type."""
        try:
            return entry_class(values["type"]) if cls is RewardEntry else cls
        except (KeyError, TypeError, ValueError):
            return cls

    @model_validator(mode="wrap")
    @classmethod
    def _validated_by_what_its_type_names(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if cls is not RewardEntry or isinstance(values, RewardEntry):
            return handler(values)
        if not isinstance(values, dict):
            raise ValueError(f"must be a mapping with a type, such as {{type: {DEFAULT}}}")
        try:
            of_type = entry_class(values.get("type"))
        except ValueError as error:
            problem = PydanticCustomError("unknown_reward", "{problem}", {"problem": str(error)})
            place = InitErrorDetails(type=problem, loc=("type",), input=values.get("type"))
            raise ValidationError.from_exception_data(cls.__name__, [place]) from None
        return cast(Self, of_type.model_validate(values))


class RewardConfig(RewardEntry):
    """Settings of a reward; each reward has a subclass with further fields.

    Attributes:
        uses: uses of its stages in a training step, known without loading anything.
        stage_code: modules whose code defines the stages; the whole reward if empty.
        needs: what it needs of a sample besides the generated frames.
        needs_neighbours: whether it compares consecutive frames, so that none may be skipped.
    """

    uses: ClassVar[tuple[Use, ...]] = ()
    stage_code: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})
    needs_neighbours: ClassVar[bool] = False

    weight: float = Field(default=0.1, ge=0, description="weight of the reward in the loss")
    baseline: float = Field(default=0.0, description="score at which the reward is zero")
    scale: float = Field(default=1.0, gt=0, description="standard deviation used to normalise the score")
    cap: float | None = Field(default=None, description=_CAP)
    frames: str = Field(default=ALL, description=_FRAMES)
    on_unscored: OnUnscored = Field(
        default="skip",
        description="samples that cannot be scored: ignore them, count them as score 0, or raise an error",
    )

    @model_validator(mode="before")
    @classmethod
    def _goes_by_the_name_of_its_file(cls, values: Any) -> Any:
        return {"type": cls.__module__.rpartition(".")[2], **values} if isinstance(values, dict) else values

    @field_validator("frames")
    @classmethod
    def _frames_can_be_selected(cls, value: str) -> str:
        if check_selection(value) != ALL and cls.needs_neighbours:
            raise ValueError(f"this reward compares neighbouring frames: it only supports {ALL}, not {value!r}")
        return value

    @property
    def label(self) -> str:
        """Return the label of its score in judges and files, which distinguishes rewards of one type."""
        return self.type

    def step_uses(self) -> tuple[Use, ...]:
        """Return the uses with these settings: those of the class, or fewer."""
        return self.uses

    def stage_names(self) -> tuple[str, ...]:
        """Return the names of the reward's stages."""
        return tuple(dict.fromkeys(use.stage for use in self.step_uses()))

    def build(self) -> Reward:
        """Create a built-in reward. Imports that take long belong here, because settings are read without them.

        Raises:
            ConfigError: a requirement, such as a file of weights, is missing.
        """
        raise NotImplementedError(f"{type(self).__module__}.Config.build")


class ClassEntry(RewardEntry):
    """A reward of a user, `package.module:Class`. Null settings have the defaults of the class's `Config`."""

    weight: float | None = Field(default=None, ge=0, description="weight of the reward in the loss")
    baseline: float | None = Field(default=None, description="score at which the reward is zero")
    scale: float | None = Field(default=None, gt=0, description="standard deviation used to normalise the score")
    cap: float | None = Field(default=None, description=_CAP)
    frames: str | None = Field(default=None, description=_FRAMES)
    on_unscored: OnUnscored | None = Field(
        default=None, description="samples that cannot be scored: ignore them, count them as score 0, or raise an error"
    )
    options: dict[str, Any] = Field(default={}, description="fields of the class's own Config")

    def values(self) -> dict[str, Any]:
        """Return the values for the class's `Config`."""
        own = self.model_dump(exclude={"options"}, exclude_none=True)
        return {**self.options, **own}


def default_rewards() -> tuple[RewardEntry, ...]:
    """Return the default rewards: only the face-identity reward."""
    return (RewardEntry.parse({"type": DEFAULT}),)


def entry_class(name: object) -> type[RewardEntry]:
    """Return the class that validates an entry of this type.

    Raises:
        ValueError: there is no such reward; the message lists the valid names.
    """
    if not isinstance(name, str):
        raise ValueError(f"must name a reward, {_known()}")
    return ClassEntry if ":" in name else _builtin_config(name)


def stage_names(entries: Iterable[RewardEntry]) -> tuple[str, ...] | None:
    """Return the stage names of rewards; None if a class would have to be imported to know them."""
    names: list[str] = []
    for entry in entries:
        if not isinstance(entry, RewardConfig):
            return None
        names += entry.stage_names()
    return tuple(names)


def code_of_stages(entries: Iterable[RewardEntry]) -> list[str]:
    """Return the modules that define the stages of rewards; the caller follows their imports."""
    modules: list[str] = []
    for entry in entries:
        if isinstance(entry, RewardConfig):
            modules += entry.stage_code or ([type(entry).__module__] if entry.uses else [])
        else:
            modules.append(entry.type.partition(":")[0])
    return modules


def builtin_names() -> list[str]:
    """Return the names of the built-in rewards from their sources, without importing any."""
    found = []
    for module in pkgutil.iter_modules(_folders()):
        spec = PathFinder.find_spec(f"{__package__}.{module.name}", _folders())
        if spec is not None and spec.origin is not None:
            source = Path(spec.origin).read_text(encoding="utf-8", errors="replace")
            found += [module.name] if _DEFINES_A_CONFIG.search(source) else []
    return sorted(found)


def _builtin_config(name: str) -> type[RewardConfig]:
    module = f"{__package__}.{name}"
    if name.isidentifier() and PathFinder.find_spec(module, _folders()) is not None:
        try:
            config = getattr(importlib.import_module(module), "Config", None)
        except ImportError as error:
            raise ValueError(f"the reward {name} cannot be imported: {error}") from error
        if inspect.isclass(config) and issubclass(config, RewardConfig):
            return config
    close = difflib.get_close_matches(name, builtin_names(), n=1, cutoff=0.5)
    raise ValueError(f"there is no reward {name!r}, {f'did you mean {close[0]}?' if close else _known()}")


def _known() -> str:
    return f"valid names: {', '.join(builtin_names())}, or your own class as package.module:Class"


def _folders() -> list[str]:
    return [*sys.modules[__package__ or ""].__path__]
