"""Create rewards from entries of the settings."""

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
# Settings of every reward, none of which affects references.
_OF_ANY_REWARD = {*RewardConfig.model_fields} - {"type"}
_INTERFACE = ("name", "unscored", "stages", "live_networks", "references", "score")


class FrozenNetworks(nn.ModuleList):
    """The networks of rewards; calling `train` on a module that contains them does not enable dropout."""

    def __init__(self, rewards: Sequence[ActiveReward]) -> None:
        super().__init__(network for active in rewards for network in networks_of(active.reward))
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)


def build_rewards(
    entries: Sequence[RewardEntry], device: torch.device | str, shapes: ShapeRange, section: str = REWARDS
) -> tuple[ActiveReward, ...]:
    """Create all rewards, or judges, of a section of the settings, with their networks on `device`, and their stages.

    Args:
        section: `rewards` or `validation.judges`, for error messages.
    Raises:
        ConfigError: a class cannot be found or instantiated; a file is missing; two rewards have the same name, or two
            judges the same label; or the stages of a reward are not those in its `Config`.
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
                f"{section}.{number} {config.type}: its stages ({_listed(names)}) differ from those in "
                f"uses of its Config ({_listed(config.stage_names())})"
            )
        active.append(ActiveReward(reward, config, stages, _references_key(reward, config, stages)))
    return tuple(active)


def check_rewards(entries: Sequence[RewardEntry], runs: bool, section: str = REWARDS) -> None:
    """Check rewards before a model is loaded, by creating them.

    Args:
        runs: whether a run follows; otherwise the user's modules are only searched for, not imported.
        section: see `build_rewards`.
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
    """Create the built-in rewards among `entries`, without importing a user's module.

    Raises:
        ConfigError: a requirement, such as a file of weights, is missing.
    """
    own = [(number, entry) for number, entry in enumerate(entries) if isinstance(entry, RewardConfig)]
    return [_make(f"{section}.{number}", entry) for number, entry in own]


def resolve(entries: Sequence[RewardEntry], section: str = REWARDS) -> tuple[RewardConfig, ...]:
    """Return the settings of each reward; imports a user's class.

    Raises:
        ConfigError: there is no such class, or the entry is invalid for its `Config`.
    """
    return tuple(_resolved(f"{section}.{number}", entry)[0] for number, entry in enumerate(entries))


def networks_of(reward: Reward) -> list[nn.Module]:
    """Return the networks of a reward: the reward itself, or its attributes."""
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
        raise ConfigError(f"{where} {entry.type}: cannot be created from its Config: {error}") from error
    for name in _INTERFACE:
        if not hasattr(reward, name):
            raise ConfigError(
                f"{where} {entry.type}: is not a reward, it has no {name!r}: inherit from "
                "frostline.rewards.reward.Reward (see docs/rewards/README.md)"
            )
    return reward, config


def _resolved(where: str, entry: RewardEntry) -> tuple[RewardConfig, type[Any] | None]:
    """Return the settings of a reward; for a user's class, also the class."""
    if isinstance(entry, RewardConfig):
        return entry, None
    assert isinstance(entry, ClassEntry)
    made_by = import_reward(entry.type, where)
    config = getattr(made_by, "Config", None)
    if not (isinstance(config, type) and issubclass(config, RewardConfig)):
        raise ConfigError(
            f"{where} {entry.type}: is not a reward, it has no Config that is a "
            "frostline.rewards.config.RewardConfig (see docs/rewards/README.md)"
        )
    if beside := sorted(entry.options.keys() & RewardConfig.model_fields.keys()):
        raise ConfigError(f"{where}.options.{beside[0]}: move this setting out of options, to {where}.{beside[0]}")
    try:
        return config.parse(entry.values()), made_by
    except ConfigError as error:
        raise ConfigError(f"{where}.options ({entry.type}): {error}") from None


def _check_names(section: str, made: Sequence[tuple[Reward, RewardConfig]]) -> None:
    """Check that the names of rewards, or the labels of judges, are unique."""
    if section == REWARDS:
        names, advice = [reward.name for reward, _ in made], "remove one and add its weight to the other"
    else:
        names, advice = [label_of(reward, config) for reward, config in made], "remove one"
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{section}: two entries have the name {name!r}: {advice}")


def _references_key(reward: Reward, config: RewardConfig, stages: Sequence[Stage]) -> str:
    module = type(reward).__module__
    return content_key(
        config=config.model_dump(mode="json", exclude=_OF_ANY_REWARD),
        computation=computation_id([module], source_of=[module.partition(".")[0]]),
        state=dict(_state(reward, stages)),
        files=[file_sha256(path) for path in getattr(reward, "reference_files", ())],
    )


def _state(reward: Reward, stages: Sequence[Stage]) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors of a reward and its networks, without those of its stages, which are hashed separately."""
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
