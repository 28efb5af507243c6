"""What a score depends on, beside the frames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, SerializeAsAny, model_validator

from frostline.errors import ConfigError
from frostline.rewards.config import DEFAULT, OF_THE_LOSS, RewardConfig, RewardEntry, default_rewards
from frostline.rewards.face_identity import Config as FaceIdentityConfig
from frostline.rewards.face_identity.options import FaceOptions
from frostline.rewards.frame_selection import ALL
from frostline.rewards.inputs import Need
from frostline.score.result import FACE_SCORE, FIELDS


class ScoreSettings(FaceOptions):
    """How videos are scored; the names and defaults are the face-identity reward's where both have them."""

    every: int = Field(default=1, ge=1, description="score every Nth frame")
    max_frames: int | None = Field(default=None, ge=1, description="score at most this many frames of a video")

    rewards: tuple[SerializeAsAny[RewardEntry], ...] = Field(
        default_factory=default_rewards, min_length=1, description="what videos are scored by, each by its type"
    )

    @model_validator(mode="after")
    def _options_of_faces_have_a_reward(self) -> Self:
        faces = [entry for entry in self.rewards if isinstance(entry, FaceIdentityConfig)]
        for name in FaceOptions.model_fields:
            value = getattr(self, name)
            if value == type(self).model_fields[name].default:
                continue
            if not faces:
                raise ValueError(f"{name}: is a setting of the reward {DEFAULT}, which is not among the rewards")
            for entry in faces:
                if name in entry.model_fields_set and getattr(entry, name) != value:
                    raise ValueError(f"{name}: is {value} here and {getattr(entry, name)} in rewards: say it once")
        for entry in faces:
            FaceOptions.model_construct(**self._options_of(entry)).check_together()
        if any(entry.frames != ALL for entry in faces):
            raise ValueError(f"rewards: {DEFAULT} scores all frames of a file: choose them by every and max_frames")
        return self

    def with_rewards(self, rewards: Sequence[RewardEntry]) -> ScoreSettings:
        """These settings with other rewards, if there are any.

        Raises:
            ConfigError: they do not go together.
        """
        own = {name: value for name, value in self if name != "rewards"}
        return ScoreSettings.parse({**own, "rewards": tuple(rewards)}) if rewards else self

    @property
    def entries(self) -> tuple[RewardEntry, ...]:
        """The rewards; `face_identity` with the options above, where its entry says nothing else."""
        return tuple(
            entry.model_copy(update=self._options_of(entry)) if isinstance(entry, FaceIdentityConfig) else entry
            for entry in self.rewards
        )

    def _options_of(self, entry: FaceIdentityConfig) -> dict[str, Any]:
        """Return the face options of a `face_identity` entry: those that it sets, and these settings for the others."""
        return {
            name: getattr(entry if name in entry.model_fields_set else self, name) for name in FaceOptions.model_fields
        }

    @property
    def faces(self) -> FaceIdentityConfig | None:
        """The settings of `face_identity`, if it is among the rewards."""
        return next((entry for entry in self.entries if isinstance(entry, FaceIdentityConfig)), None)

    def configs(self) -> tuple[RewardConfig, ...]:
        """The settings of each reward. Classes of the user's are imported for it.

        Raises:
            ConfigError: a class cannot be found, or refuses its settings.
        """
        configs = tuple(entry for entry in self.entries if isinstance(entry, RewardConfig))
        if len(configs) == len(self.rewards):
            return configs
        from frostline.rewards.build import resolve

        return resolve(self.entries)

    def needs(self) -> frozenset[Need]:
        """What rewards need beside a video.

        Raises:
            ConfigError: as `configs`, or a reward needs what a file does not have.
        """
        configs = self.configs()
        for config in configs:
            if "latents" in config.needs:
                raise ConfigError(f"the reward {config.type} needs generated latents, which video files do not have")
        return frozenset[Need]().union(*(config.needs for config in configs))

    def labels(self) -> tuple[str, ...]:
        """The column of each reward's score.

        Raises:
            ConfigError: as `configs`, two are one, or one cannot be a column.
        """
        labels = tuple(map(_label, self.configs()))
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(f"rewards: two go by the name {label!r}, and could not be told apart in results")
            if (label in FIELDS and label != FACE_SCORE) or not label.isprintable() or {*label} & {*' ,"='}:
                raise ConfigError(f"rewards: {label!r} cannot be a column of results: call the reward otherwise")
        return labels

    def __str__(self) -> str:
        """As results carry it, so that nobody mixes results of different settings."""
        frames = {"every": self.every, "max_frames": self.max_frames}
        own = {**self._options_of_faces(), **frames} if self.rewards_are_faces() else frames
        texts = [f"{name}={'all' if value is None else value}" for name, value in own.items()]
        if not self.rewards_are_faces():
            for entry in self.entries:
                values = entry.model_dump(mode="json", exclude={"type", "on_unscored", *OF_THE_LOSS})
                texts.append(f"{entry.type}={json.dumps(values, sort_keys=True, separators=(',', ':'))}")
        return " ".join(texts)

    def rewards_are_faces(self) -> bool:
        """Whether videos are scored by `face_identity` alone."""
        return len(self.rewards) == 1 and self.faces is not None

    def _options_of_faces(self) -> dict[str, Any]:
        assert self.faces is not None
        return {name: getattr(self.faces, name) for name in FaceOptions.model_fields}


def _label(config: RewardConfig) -> str:
    """Its label, and of a user's class that has none the name of the reward."""
    if isinstance(config, FaceIdentityConfig):
        return FACE_SCORE
    if config.label != config.type or ":" not in config.type:
        return config.label
    from frostline.rewards.reward_class import import_reward

    return str(getattr(import_reward(config.type, "rewards"), "name", config.type))
