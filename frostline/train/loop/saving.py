"""Save a run to a checkpoint and restore it, bit for bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from frostline.config import AUTO, CHECKPOINTING
from frostline.documents import dump_yaml
from frostline.errors import CheckpointError
from frostline.models.lora.base_adapters import adapter_digests
from frostline.package_info import installed_versions
from frostline.runtime.backends import engine_packages
from frostline.stages.families import family_of
from frostline.train.loop.average import AdapterAverage
from frostline.train.loop.checkpoint import (
    BASE_ADAPTERS,
    EXPERTS,
    Checkpoint,
    check_same_experts,
    read_state,
    rotate,
    write_checkpoint,
)
from frostline.train.loop.optimizer_step import Training
from frostline.train.loop.run_dir import CONFIG
from frostline.train.loop.state import (
    optimizer_tensors,
    random_tensors,
    restore_optimizer,
    restore_random,
    restore_schedule,
)
from frostline.train.processes import gather_from_processes
from frostline.train.step.module import TrainingModule

log = logging.getLogger(__name__)

_OPTIMIZER, _AVERAGE, _STATE = "optimizer.safetensors", "adapter_ema.safetensors", "state.json"
# Packages that affect results, besides those of engines.
_PACKAGES = ("frostline", "torch", "accelerate", "peft")


def save(training: Training, folder: Path, config: Mapping[str, Any]) -> None:
    """Write `folder/checkpoint-<step>` and delete the oldest beyond `save_total_limit`; called on all processes.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are not affected.
    """
    stale = training.module.parts.stale
    tensors = {"random": training.random, **({} if stale is None else {"rollout": stale.tensors()})}
    of_processes = gather_from_processes(tensors)
    if training.accelerator.is_main_process:
        write_checkpoint(folder, training.step, lambda partial: _write(training, of_processes, config, partial))
        rotate(folder, training.settings.save_total_limit)


def restore(training: Training, checkpoint: Checkpoint) -> None:
    """Restore the result of `save`; the checkpoint must have been verified.

    Raises:
        ConfigError: the adapter does not match the model, or belongs to another expert.
        CheckpointError: the checkpoint was written by another version, or was renamed.
    """
    try:
        state = read_state(checkpoint)
        if int(state["step"]) != checkpoint.step:
            raise ValueError(f"its state belongs to step {state['step']}: was it renamed?")
        check_same_experts(checkpoint, training.module.settings.lora)
        training.module.load_adapter(checkpoint.path)
        tensors = safetensors.torch.load_file(checkpoint.path / _OPTIMIZER)
        restore_optimizer(training.optimizer, training.parameters, tensors)
        training.step, training.samples = int(state["step"]), int(state["samples"])
        training.skipped, training.skipped_in_row = int(state["skipped"]), int(state["skipped_in_row"])
        restore_schedule(training.scheduler, training.step - training.skipped)
        if training.module.settings.gradient_checkpointing == AUTO:
            # The kind of checkpointing is chosen by free memory; another kind would change the order of sums.
            training.module.checkpoint(CHECKPOINTING[CHECKPOINTING.index(state["gradient_checkpointing"])])
        if training.module.settings.kl_target is not None:
            training.module.kl_weight = float(state["kl_weight"])
        if training.average is not None:
            _restore_average(training.average, training, checkpoint, state["ema_updates"])
        _restore_of_process(training, checkpoint, int(state["processes"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{checkpoint.path} cannot be restored: {what}") from error


def package_versions(module: TrainingModule) -> dict[str, str]:
    """Return the versions of Python and of all packages that affect the results of a run."""
    return installed_versions((*_PACKAGES, *family_of(module.components).PACKAGES, *engine_packages()))


def _write(
    training: Training, of_processes: list[dict[str, dict[str, Tensor]]], config: Mapping[str, Any], folder: Path
) -> None:
    training.module.save_adapter(folder)
    names = {id(parameter): name for name, parameter in training.parameters.items()}
    _write_tensors(folder / _OPTIMIZER, optimizer_tensors(training.optimizer, names))
    if training.average is not None:
        _write_tensors(folder / _AVERAGE, training.average.tensors())
    for process, by_kind in enumerate(of_processes):
        for kind, tensors in by_kind.items():
            _write_tensors(folder / _file_of_process(kind, process), tensors)
    state = {
        "step": training.step,
        "samples": training.samples,
        "skipped": training.skipped,
        "skipped_in_row": training.skipped_in_row,
        "ema_updates": None if training.average is None else training.average.updates,
        "kl_weight": training.module.kl_weight,
        "processes": training.accelerator.num_processes,
        EXPERTS: training.module.settings.lora.experts,
        BASE_ADAPTERS: adapter_digests(Path(adapter["path"]) for adapter in config.get("base_adapters") or ()),
        "gradient_checkpointing": training.module.gradient_checkpointing,
        "versions": package_versions(training.module),
    }
    (folder / _STATE).write_text(json.dumps(state, indent=2) + "\n")
    (folder / CONFIG).write_text(dump_yaml(config), encoding="utf-8")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Serialised in Python, so that a full disk raises an OSError with that reason.
    path.write_bytes(safetensors.torch.save(dict(tensors)))


def _restore_average(average: AdapterAverage, training: Training, checkpoint: Checkpoint, updates: int | None) -> None:
    """Restore the average and its number of updates; if the run had none, start with the current adapter."""
    if updates is None:
        average.restore(training.parameters, 0)
    else:
        average.restore(safetensors.torch.load_file(checkpoint.path / _AVERAGE), updates)


def _restore_of_process(training: Training, checkpoint: Checkpoint, processes: int) -> None:
    """Restore the generators and latents of each process; additional processes keep their own seed."""
    process = training.accelerator.process_index
    if processes != training.accelerator.num_processes:
        log.warning(
            "%s was written by %d processes, but this run has %d",
            checkpoint.path,
            processes,
            training.accelerator.num_processes,
        )
    if process < processes:
        restore_random(safetensors.torch.load_file(checkpoint.path / _file_of_process("random", process)))
    training.random = random_tensors()
    if (stale := training.module.parts.stale) is not None:
        path = checkpoint.path / _file_of_process("rollout", process)
        stale.restore(safetensors.torch.load_file(path) if path.exists() else {}, training.step)


def _file_of_process(kind: str, process: int) -> str:
    return f"{kind}-{process}.safetensors"
