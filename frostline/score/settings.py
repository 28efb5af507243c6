"""Define the settings that a score depends on."""

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
    """Settings of scoring. The face options have the names and defaults of the reward `face_identity`."""

    every: int = Field(default=1, ge=1, description="score every Nth frame")
    max_frames: int | None = Field(default=None, ge=1, description="score at most this many frames of a video")

    rewards: tuple[SerializeAsAny[RewardEntry], ...] = Field(
        default_factory=default_rewards,
        min_length=1,
        description="the rewards to score videos with, each with its type",
    )

    @model_validator(mode="after")
    def _options_of_faces_have_a_reward(self) -> Self:
        faces = [entry for entry in self.rewards if isinstance(entry, FaceIdentityConfig)]
        for name in FaceOptions.model_fields:
            value = getattr(self, name)
            if value == type(self).model_fields[name].default:
                continue
            if not faces:
                raise ValueError(
                    f"{name}: is a setting of the reward {DEFAULT}, which is not one of the rewards: add the "
                    "reward, or remove the setting"
                )
            for entry in faces:
                if name in entry.model_fields_set and getattr(entry, name) != value:
                    raise ValueError(
                        f"{name}: is {value} in the score settings, but {getattr(entry, name)} in rewards: set only one"
                    )
        for entry in faces:
            FaceOptions.model_construct(**self._options_of(entry)).check_together()
        if any(entry.frames != ALL for entry in faces):
            raise ValueError(
                f"rewards: {DEFAULT} scores all frames of a file: use every and max_frames instead of frames"
            )
        return self

    def with_rewards(self, rewards: Sequence[RewardEntry]) -> ScoreSettings:
        """Return these settings with other rewards; unchanged if `rewards` is empty.

        Raises:
            ConfigError: the rewards and the settings contradict each other.
        """
        own = {name: value for name, value in self if name != "rewards"}
        return ScoreSettings.parse({**own, "rewards": tuple(rewards)}) if rewards else self

    @property
    def entries(self) -> tuple[RewardEntry, ...]:
        """Return the rewards. Face options that `face_identity` does not set itself are taken from these settings."""
        return tuple(
            entry.model_copy(update=self._options_of(entry)) if isinstance(entry, FaceIdentityConfig) else entry
            for entry in self.rewards
        )

    def _options_of(self, entry: FaceIdentityConfig) -> dict[str, Any]:
        """Return the face options of a `face_identity` entry; options that it does not set are taken from `self`."""
        return {
            name: getattr(entry if name in entry.model_fields_set else self, name) for name in FaceOptions.model_fields
        }

    @property
    def faces(self) -> FaceIdentityConfig | None:
        """Return the settings of `face_identity`; None if it is not one of the rewards."""
        return next((entry for entry in self.entries if isinstance(entry, FaceIdentityConfig)), None)

    def configs(self) -> tuple[RewardConfig, ...]:
        """Return the settings of each reward. Imports custom reward classes.

        Raises:
            ConfigError: a class cannot be imported, or its settings are invalid.
        """
        configs = tuple(entry for entry in self.entries if isinstance(entry, RewardConfig))
        if len(configs) == len(self.rewards):
            return configs
        from frostline.rewards.build import resolve

        return resolve(self.entries)

    def needs(self) -> frozenset[Need]:
        """Return the inputs that the rewards need in addition to a video.

        Raises:
            ConfigError: see `configs`; also if a reward needs latents, which video files do not have.
        """
        configs = self.configs()
        for config in configs:
            if "latents" in config.needs:
                raise ConfigError(f"the reward {config.type} needs generated latents, which video files do not have")
        return frozenset[Need]().union(*(config.needs for config in configs))

    def labels(self) -> tuple[str, ...]:
        """Return the score column of each reward.

        Raises:
            ConfigError: see `configs`; also if two rewards have the same label, or a label is not a valid column name.
        """
        labels = tuple(map(_label, self.configs()))
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(
                    f"rewards: two rewards have the name {label!r}: remove one of them, or change the `name` of a "
                    "custom reward"
                )
            if (label in FIELDS and label != FACE_SCORE) or not label.isprintable() or {*label} & {*' ,"='}:
                raise ConfigError(
                    f"rewards: {label!r} is not a valid column name for results: change the `name` of the reward"
                )
        return labels

    def __str__(self) -> str:
        """Return the text that is stored in each result, to detect results of other settings."""
        frames = {"every": self.every, "max_frames": self.max_frames}
        own = {**self._options_of_faces(), **frames} if self.rewards_are_faces() else frames
        texts = [f"{name}={'all' if value is None else value}" for name, value in own.items()]
        if not self.rewards_are_faces():
            for entry in self.entries:
                values = entry.model_dump(mode="json", exclude={"type", "on_unscored", *OF_THE_LOSS})
                texts.append(f"{entry.type}={json.dumps(values, sort_keys=True, separators=(',', ':'))}")
        return " ".join(texts)

    def rewards_are_faces(self) -> bool:
        """Return whether `face_identity` is the only reward."""
        return len(self.rewards) == 1 and self.faces is not None

    def _options_of_faces(self) -> dict[str, Any]:
        assert self.faces is not None
        return {name: getattr(self.faces, name) for name in FaceOptions.model_fields}


def _label(config: RewardConfig) -> str:
    """Return the label of a reward; for a custom class without a label, the class's `name`."""
    if isinstance(config, FaceIdentityConfig):
        return FACE_SCORE
    if config.label != config.type or ":" not in config.type:
        return config.label
    from frostline.rewards.reward_class import import_reward

    return str(getattr(import_reward(config.type, "rewards"), "name", config.type))
