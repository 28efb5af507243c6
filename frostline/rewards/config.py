"""Settings of rewards: a list of entries, each validated by the reward that its `type` names.

A type without a colon is a file or folder beside this one, found by its name alone: it has a `Config`. One with a colon
is a class of the user's, whose module is not imported here: whoever only looks at settings does not ask to run it.
Neither is torch.
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
"""Settings of any reward that only weigh its score in the loss."""
_CAP = "score of a sample above which there is no more gain and no gradient; no cap if not given"
_FRAMES = "generated frames that are looked at: all, first, last, every:N or random:N"
_DEFINES_A_CONFIG = re.compile(r"^class Config\(", re.MULTILINE)


class RewardEntry(Settings):
    """One of the rewards, whose parts in the loss are added: `-(score - baseline) / scale * weight`."""

    type: str = Field(
        description="name of a reward (a file or folder in frostline/rewards), or package.module:Class of your own"
    )

    @classmethod
    def for_values(cls, values: Any) -> type[RewardEntry]:
        """The class that validates an entry with these values, which their type decides."""
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
    """What the settings say of a reward; each reward has a subclass with fields of its own.

    uses: of the stages that the reward brings, in a training step; told without loading anything.
    stage_code: the modules whose code makes them; those of the whole reward where it names none.
    needs: what it needs of a sample beside the generated frames.
    needs_neighbours: whether it compares frames that follow each other, so that none may be left out.
    """

    uses: ClassVar[tuple[Use, ...]] = ()
    stage_code: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})
    needs_neighbours: ClassVar[bool] = False

    weight: float = Field(default=0.1, ge=0, description="weight of the reward in the loss")
    baseline: float = Field(default=0.0, description="score at which the reward is zero")
    scale: float = Field(default=1.0, gt=0, description="spread of scores that counts as one unit")
    cap: float | None = Field(default=None, description=_CAP)
    frames: str = Field(default=ALL, description=_FRAMES)
    on_unscored: OnUnscored = Field(
        default="skip", description="samples that cannot be scored: no reward, a score of 0, or an error"
    )

    @model_validator(mode="before")
    @classmethod
    def _goes_by_the_name_of_its_file(cls, values: Any) -> Any:
        return {"type": cls.__module__.rpartition(".")[2], **values} if isinstance(values, dict) else values

    @field_validator("frames")
    @classmethod
    def _frames_can_be_selected(cls, value: str) -> str:
        if check_selection(value) != ALL and cls.needs_neighbours:
            raise ValueError(f"this reward compares neighbouring frames: it takes {ALL} alone, not {value!r}")
        return value

    @property
    def label(self) -> str:
        """What its score is called where several rewards of one type may be: those of judges and of files."""
        return self.type

    def step_uses(self) -> tuple[Use, ...]:
        """Return the uses with these settings: those of the class, or fewer."""
        return self.uses

    def stage_names(self) -> tuple[str, ...]:
        """Return the names of the stages that the reward brings."""
        return tuple(dict.fromkeys(use.stage for use in self.step_uses()))

    def build(self) -> Reward:
        """Make the reward; what takes long to import is imported here. Only rewards of frostline are made this way.

        Raises:
            ConfigError: what it needs, such as a file of weights, cannot be had.
        """
        raise NotImplementedError(f"{type(self).__module__}.Config.build")


class ClassEntry(RewardEntry):
    """A reward of the user's, `package.module:Class`. What is null here is as the class's `Config` has it."""

    weight: float | None = Field(default=None, ge=0, description="weight of the reward in the loss")
    baseline: float | None = Field(default=None, description="score at which the reward is zero")
    scale: float | None = Field(default=None, gt=0, description="spread of scores that counts as one unit")
    cap: float | None = Field(default=None, description=_CAP)
    frames: str | None = Field(default=None, description=_FRAMES)
    on_unscored: OnUnscored | None = Field(
        default=None, description="samples that cannot be scored: no reward, a score of 0, or an error"
    )
    options: dict[str, Any] = Field(default={}, description="the fields of the class's own Config")

    def values(self) -> dict[str, Any]:
        """What the class's `Config` is made of."""
        own = self.model_dump(exclude={"options"}, exclude_none=True)
        return {**self.options, **own}


def default_rewards() -> tuple[RewardEntry, ...]:
    """The reward of faces alone, as it is by default."""
    return (RewardEntry.parse({"type": DEFAULT}),)


def entry_class(name: object) -> type[RewardEntry]:
    """The class that validates an entry of this type.

    Raises:
        ValueError: there is no such reward; says which there are.
    """
    if not isinstance(name, str):
        raise ValueError(f"must name a reward, {_known()}")
    return ClassEntry if ":" in name else _builtin_config(name)


def stage_names(entries: Iterable[RewardEntry]) -> tuple[str, ...] | None:
    """The stages that rewards bring; None where only a class that is not imported here could tell."""
    names: list[str] = []
    for entry in entries:
        if not isinstance(entry, RewardConfig):
            return None
        names += entry.stage_names()
    return tuple(names)


def code_of_stages(entries: Iterable[RewardEntry]) -> list[str]:
    """The modules whose code makes the stages of rewards; what they import is for the caller to follow."""
    modules: list[str] = []
    for entry in entries:
        if isinstance(entry, RewardConfig):
            modules += entry.stage_code or ([type(entry).__module__] if entry.uses else [])
        else:
            modules.append(entry.type.partition(":")[0])
    return modules


def builtin_names() -> list[str]:
    """The rewards of frostline, told from their sources: none is imported."""
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
    raise ValueError(f"there is no reward {name!r}, {f'is {close[0]} meant?' if close else _known()}")


def _known() -> str:
    return f"known are {', '.join(builtin_names())}, and package.module:Class of your own"


def _folders() -> list[str]:
    return [*sys.modules[__package__ or ""].__path__]
