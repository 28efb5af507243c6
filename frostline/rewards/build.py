"""From entries of the settings to rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from frostline.atomic_io import file_sha256
from frostline.errors import ConfigError
from frostline.rewards.active import ActiveReward, label_of
from frostline.rewards.config import ClassEntry, RewardConfig, RewardEntry
from frostline.rewards.reward import Reward
from frostline.rewards.reward_class import import_reward, look_for_reward
from frostline.runtime.cache import content_key
from frostline.runtime.identity.computation import computation_id
from frostline.runtime.stage import Stage
from frostline.stages.shapes import ShapeRange

# The sections of the settings that list rewards.
REWARDS, JUDGES = "rewards", "validation.judges"
# What only weighs a score says nothing of references.
_OF_ANY_REWARD = {*RewardConfig.model_fields} - {"type"}
_INTERFACE = ("name", "unscored", "stages", "live_networks", "references", "score")


class FrozenNetworks(nn.ModuleList):
    """The networks of rewards; whoever puts a module around them into training mode wakes no dropout in them."""

    def __init__(self, rewards: Sequence[ActiveReward]) -> None:
        super().__init__(network for active in rewards for network in networks_of(active.reward))
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay as they are."""
        return super().train(False)


def build_rewards(
    entries: Sequence[RewardEntry], device: torch.device | str, shapes: ShapeRange, section: str = REWARDS
) -> tuple[ActiveReward, ...]:
    """All rewards, or judges, of a section of the settings, their networks on `device`, and their stages.

    Args:
        section: `rewards` or `validation.judges`, to be named in errors.
    Raises:
        ConfigError: a class cannot be found or made, a file is missing, or two rewards go by one name, or two judges by
            one label.
    """
    made = [_make(f"{section}.{number}", entry) for number, entry in enumerate(entries)]
    _check_names(section, made)
    active = []
    for number, (reward, config) in enumerate(made):
        for network in networks_of(reward):
            network.to(device).eval().requires_grad_(False)
        stages = tuple(reward.stages(shapes))
        names = {stage.name for stage in stages}
        if names != {*config.stage_names()}:
            raise ConfigError(
                f"{section}.{number} {config.type}: the stages that it brings ({_listed(names)}) are not those that "
                f"its Config names in uses ({_listed(config.stage_names())})"
            )
        active.append(ActiveReward(reward, config, stages, _references_key(reward, config, stages)))
    return tuple(active)


def check_rewards(entries: Sequence[RewardEntry], runs: bool, section: str = REWARDS) -> None:
    """Refuse what can be refused before a model is loaded, by making the rewards.

    Args:
        runs: whether a run follows; where it does not, nothing of the user's is imported, only looked for.
        section: as for `build_rewards`.
    Raises:
        ConfigError: see `build_rewards`.
    """
    made = []
    for number, entry in enumerate(entries):
        where = f"{section}.{number}"
        if isinstance(entry, ClassEntry) and not runs:
            look_for_reward(entry.type, where)
        else:
            made.append(_make(where, entry))
    _check_names(section, made)


def make_builtin(entries: Sequence[RewardEntry], section: str = REWARDS) -> list[tuple[Reward, RewardConfig]]:
    """Make the rewards among `entries` that are frostline's own: no module of the user's is imported.

    Raises:
        ConfigError: what one needs, such as a file of weights, cannot be had.
    """
    own = [(number, entry) for number, entry in enumerate(entries) if isinstance(entry, RewardConfig)]
    return [_make(f"{section}.{number}", entry) for number, entry in own]


def resolve(entries: Sequence[RewardEntry], section: str = REWARDS) -> tuple[RewardConfig, ...]:
    """The settings of each reward; a class of the user's is imported for them.

    Raises:
        ConfigError: there is no such class, or its `Config` refuses the entry.
    """
    return tuple(_resolved(f"{section}.{number}", entry)[0] for number, entry in enumerate(entries))


def networks_of(reward: Reward) -> list[nn.Module]:
    """The networks of a reward: itself, or else those that are its attributes."""
    parts = [reward] if isinstance(reward, nn.Module) else vars(reward).values()
    return [part for part in parts if isinstance(part, nn.Module)]


def _make(where: str, entry: RewardEntry) -> tuple[Reward, RewardConfig]:
    config, made_by = _resolved(where, entry)
    if made_by is None:
        try:
            return config.build(), config
        except ConfigError as error:
            raise ConfigError(f"{where} {entry.type}: {error}") from error
    try:
        reward = made_by(config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} {entry.type}: cannot be made of its Config: {error}") from error
    for name in _INTERFACE:
        if not hasattr(reward, name):
            raise ConfigError(
                f"{where} {entry.type}: is no reward, it has no {name!r}: let it inherit from "
                "frostline.rewards.reward.Reward (see ARCHITECTURE.md)"
            )
    return reward, config


def _resolved(where: str, entry: RewardEntry) -> tuple[RewardConfig, type[Any] | None]:
    """The settings of a reward; and the class that is made of them, where that is the user's."""
    if isinstance(entry, RewardConfig):
        return entry, None
    assert isinstance(entry, ClassEntry)
    made_by = import_reward(entry.type, where)
    config = getattr(made_by, "Config", None)
    if not (isinstance(config, type) and issubclass(config, RewardConfig)):
        raise ConfigError(
            f"{where} {entry.type}: is no reward, it has no Config that is a frostline.rewards.config.RewardConfig "
            "(see ARCHITECTURE.md)"
        )
    if beside := sorted(entry.options.keys() & RewardConfig.model_fields.keys()):
        raise ConfigError(f"{where}.options.{beside[0]}: belongs beside options, as {where}.{beside[0]}")
    try:
        return config.parse(entry.values()), made_by
    except ConfigError as error:
        raise ConfigError(f"{where}.options ({entry.type}): {error}") from None


def _check_names(section: str, made: Sequence[tuple[Reward, RewardConfig]]) -> None:
    """Two of one name could not be told apart in logs, nor, of rewards, two stages of one name in the runtime."""
    if section == REWARDS:
        names, advice = [reward.name for reward, _ in made], "leave one out, and give the other its weight"
    else:
        names, advice = [label_of(reward, config) for reward, config in made], "leave one out"
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{section}: two go by the name {name!r}: {advice}")


def _references_key(reward: Reward, config: RewardConfig, stages: Sequence[Stage]) -> str:
    module = type(reward).__module__
    return content_key(
        config=config.model_dump(mode="json", exclude=_OF_ANY_REWARD),
        computation=computation_id([module], source_of=[module.partition(".")[0]]),
        state=dict(_state(reward, stages)),
        files=[file_sha256(path) for path in getattr(reward, "reference_files", ())],
    )


def _state(reward: Reward, stages: Sequence[Stage]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a reward and of its networks; without those of its stages, which count by themselves."""
    of_stages = [network.module.state_dict(keep_vars=True) for stage in stages for network in stage.networks]
    counted = {id(tensor) for state in of_stages for tensor in state.values()}
    for number, network in enumerate(networks_of(reward)):
        for name, tensor in network.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in counted:
                yield f"{number}.{name}", tensor.detach()
    for name, value in vars(reward).items():
        if isinstance(value, Tensor):
            yield name, value.detach()


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
