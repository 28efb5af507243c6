"""Check the settings of a run before its model is loaded, because loading takes minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from frostline.config import AUTO
from frostline.errors import ConfigError, FrostlineError
from frostline.rewards.build import JUDGES, check_rewards, resolve
from frostline.rewards.config import stage_names
from frostline.runtime.backends import TORCH, check_backend
from frostline.stages.families import check_adapters, family_of
from frostline.train.loop.checkpoint import Checkpoint
from frostline.train.loop.output_dir import begins_in, check_start, check_writable
from frostline.train.loop.resume import check_fits, find_resume, read_trained
from frostline.train.loop.trackers import check_trackers
from frostline.train.settings import RunSettings


def problems(settings: RunSettings, runs: bool) -> Iterator[FrostlineError]:
    """Yield all problems of the settings.

    Args:
        runs: whether the run follows; otherwise no module that the settings name is imported.
    """
    checks: list[Callable[[], object]] = [
        lambda: check_rewards(settings.rewards, runs),
        lambda: check_rewards(settings.validation.judges, runs, JUDGES),
        lambda: _check_plan(settings, runs),
        lambda: check_trackers(settings.train.report_to),
        lambda: _check_lora(settings),
        lambda: _check_cache(settings),
        lambda: _check_sharding(settings),
        lambda: family_of(settings.model).check_base_adapters(settings.model, settings.base_adapters),
    ]
    for check in checks:
        try:
            check()
        except FrostlineError as error:
            yield error


def check_offload(blocks: int | str, on_cpu: bool, processes: int = 1, setting: str = "offload.blocks") -> None:
    """Check that blocks can be offloaded on the device, with this number of processes.

    Args:
        blocks: number of offloaded blocks, or `auto`.
        on_cpu: whether the device is a CPU.
        processes: number of processes of the run.
        setting: name of the setting, for the message.
    Raises:
        ConfigError: it is not supported; the message says what to do.
    """
    if blocks == 0:
        return
    if on_cpu and blocks != AUTO:
        raise ConfigError(f"{setting}: needs a GPU, because a CPU uses main memory for all weights: remove the setting")
    if processes > 1:
        raise ConfigError(
            f"{setting}: supports one process only, not {processes}: with several, shard the weights with FSDP2 "
            "(accelerate launch --use_fsdp --fsdp_version 2)"
        )


def check_output(settings: RunSettings, resume: str | None) -> Checkpoint | None:
    """Check the output folder of a run, and return the checkpoint to resume from; changes nothing.

    Args:
        resume: see `find_resume`.
    Raises:
        ConfigError: the folder contains another run, or the initial or resumed adapter does not match.
        CheckpointError: the folder cannot be written, or the checkpoint is missing or damaged.
    """
    folder = settings.output_dir
    check_writable(folder)
    checkpoint = find_resume(folder, resume)
    if begins_in(folder, checkpoint):
        check_start(folder, checkpoint, settings.overwrite_output_dir, restart=resume is not None)
    if checkpoint is not None:
        check_fits(checkpoint, settings)
    elif settings.init_adapter is not None:
        adapters = read_trained(settings.init_adapter, settings)
        if family_of(settings.model).read_spec(settings.model).from_files:
            check_adapters(settings.model, adapters)
    return checkpoint


def _check_lora(settings: RunSettings) -> None:
    family = family_of(settings.model)
    settings.lora.check_experts(family.read_spec(settings.model).two_experts)
    family.check_lora(settings.model, settings.lora)


def _check_cache(settings: RunSettings) -> None:
    if settings.precompute == "always" and settings.cache_bytes == 0:
        raise ConfigError("precompute: always needs the cache, but cache_bytes 0 disables it")


def _check_sharding(settings: RunSettings) -> None:
    # `memory.sharding` is only used in plans; a run that accelerate shards is rejected when it starts.
    if settings.quantization != "none" and settings.memory.sharding in ("fsdp", "zero3"):
        raise ConfigError(
            "quantization: weights in 8 or 4 bits cannot be sharded: remove the setting, or set "
            f"memory.sharding to ddp, not {settings.memory.sharding}"
        )


def _check_plan(settings: RunSettings, runs: bool) -> None:
    plan = settings.plan
    family = family_of(settings.model)
    rewards, judges = settings.rewards, settings.validation.judges
    if runs:
        rewards, judges = resolve(rewards), resolve(judges, JUDGES)
    of_rewards = stage_names((*rewards, *judges))
    # The stages of a user's reward are unknown unless its module is imported.
    if of_rewards is not None:
        known = tuple(dict.fromkeys((*family.STAGES, *of_rewards)))
        for stage in plan.stages:
            if stage not in known:
                raise ConfigError(f"plan.stages: there is no stage {stage!r}; valid stages: {', '.join(known)}")
    for backend in {plan.backend, *plan.stages.values()} - {AUTO, TORCH}:
        check_backend(backend)
    plan.shape_range(family.GEOMETRY)
