"""A run into a checkpoint and back, bit for bit."""

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
from frostline.package_info import installed_versions
from frostline.runtime.backends import engine_packages
from frostline.stages.families import family_of
from frostline.train.loop.checkpoint import Checkpoint, read_state, rotate, write_checkpoint
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

_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"
# What the numbers depend on, beside what engines run on.
_PACKAGES = ("frostline", "torch", "accelerate", "peft")


def save(training: Training, folder: Path, config: Mapping[str, Any]) -> None:
    """Write `folder/checkpoint-<step>` and delete the oldest beyond `save_total_limit`; called on all processes.

    Raises:
        CheckpointError: the disk does not take it; what was saved before stays.
    """
    random = gather_from_processes(training.random)
    if training.accelerator.is_main_process:
        write_checkpoint(folder, training.step, lambda partial: _write(training, random, config, partial))
        rotate(folder, training.settings.save_total_limit)


def restore(training: Training, checkpoint: Checkpoint) -> None:
    """Put back what `save` wrote; the checkpoint must have been verified.

    Raises:
        ConfigError: it is of another adapter.
        CheckpointError: it is of another version, or not what it is called.
    """
    try:
        state = read_state(checkpoint)
        if int(state["step"]) != checkpoint.step:
            raise ValueError(f"its state is of step {state['step']}: was it renamed?")
        training.module.load_adapter(checkpoint.path)
        tensors = safetensors.torch.load_file(checkpoint.path / _OPTIMIZER)
        restore_optimizer(training.optimizer, training.parameters, tensors)
        training.step, training.samples = int(state["step"]), int(state["samples"])
        training.skipped, training.skipped_in_row = int(state["skipped"]), int(state["skipped_in_row"])
        restore_schedule(training.scheduler, training.step - training.skipped)
        if training.module.settings.gradient_checkpointing == AUTO:
            # Whatever is free this time: another kind adds up in another order.
            training.module.checkpoint(CHECKPOINTING[CHECKPOINTING.index(state["gradient_checkpointing"])])
        _restore_random(training, checkpoint, int(state["processes"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{checkpoint.path} cannot be restored: {what}") from error


def package_versions(module: TrainingModule) -> dict[str, str]:
    """Return the versions of all packages that the numbers of a run depend on, and of Python."""
    return installed_versions((*_PACKAGES, *family_of(module.components).PACKAGES, *engine_packages()))


def _write(training: Training, random: list[dict[str, Tensor]], config: Mapping[str, Any], folder: Path) -> None:
    training.module.save_adapter(folder)
    names = {id(parameter): name for name, parameter in training.parameters.items()}
    _write_tensors(folder / _OPTIMIZER, optimizer_tensors(training.optimizer, names))
    for process, tensors in enumerate(random):
        _write_tensors(folder / _random_file(process), tensors)
    state = {
        "step": training.step,
        "samples": training.samples,
        "skipped": training.skipped,
        "skipped_in_row": training.skipped_in_row,
        "processes": training.accelerator.num_processes,
        "gradient_checkpointing": training.module.gradient_checkpointing,
        "versions": package_versions(training.module),
    }
    (folder / _STATE).write_text(json.dumps(state, indent=2) + "\n")
    (folder / CONFIG).write_text(dump_yaml(config), encoding="utf-8")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # In one piece by Python: what a full disk does to it is an OSError that says so.
    path.write_bytes(safetensors.torch.save(dict(tensors)))


def _restore_random(training: Training, checkpoint: Checkpoint, processes: int) -> None:
    """Each process takes up its own generators; those that are new keep their seed."""
    process = training.accelerator.process_index
    if processes != training.accelerator.num_processes:
        log.warning(
            "%s was written by %d processes, these are %d",
            checkpoint.path,
            processes,
            training.accelerator.num_processes,
        )
    if process < processes:
        restore_random(safetensors.torch.load_file(checkpoint.path / _random_file(process)))
    training.random = random_tensors()


def _random_file(process: int) -> str:
    return f"random-{process}.safetensors"
