"""One optimizer step: forward and backward passes, check for finite values, update, and metrics."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from frostline.runtime.backends import TORCH
from frostline.runtime.stage_timer import StageTime
from frostline.train.data.dataset import CollatedBatch
from frostline.train.loop.average import AdapterAverage
from frostline.train.loop.state import random_tensors
from frostline.train.machine import peak_memory_gb
from frostline.train.processes import any_process, average_gradients, gather_from_processes
from frostline.train.settings import TrainerSettings
from frostline.train.step.kl import adapted_weight
from frostline.train.step.module import TrainingModule
from frostline.train.step.result import StepMetrics


@dataclass
class Training:
    """The state of a run between two steps.

    Attributes:
        model: `module` as wrapped by accelerate.
        parameters: the LoRA matrices by name.
        replicated: whether gradients must be averaged explicitly, because the wrapper does not handle the LoRA.
        step: number of completed optimizer steps.
        samples: number of samples used so far by all processes.
        skipped, skipped_in_row: number of steps without an update, in total and consecutively.
        random: states of the random generators at the end of `step`.
        intact: False while the optimizer is updating.
        average: average of the LoRA matrices over the steps, if `ema_decay` is set.
    """

    accelerator: Accelerator
    module: TrainingModule
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    parameters: dict[str, nn.Parameter]
    settings: TrainerSettings
    replicated: bool = False
    average: AdapterAverage | None = None
    step: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    random: dict[str, Tensor] = field(default_factory=random_tensors)
    intact: bool = True

    @property
    def samples_per_step(self) -> int:
        """Return the number of samples per step in all processes."""
        settings = self.settings
        per_process = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        return per_process * self.accelerator.num_processes


def optimizer_step(training: Training, batches: Iterator[CollatedBatch]) -> dict[str, Any]:
    """Train on the next batches and advance by one step; return the line for `metrics.jsonl`.

    If a loss or the gradient is NaN or infinite in any process, the weights are not changed.
    """
    accelerator, clock = training.accelerator, training.module.runtime.clock
    parameters = list(training.parameters.values())
    learning_rate = training.scheduler.get_last_lr()[0]
    begin = time.perf_counter()
    measured = []
    finite = True
    grad_norm = torch.tensor(float("nan"))
    for _ in range(training.settings.gradient_accumulation_steps):
        batch = next(batches)
        with accelerator.accumulate(training.model):
            loss, _, kl_loss = training.model(batch)
            backward: dict[str, StageTime] = {}
            finite &= not any_process(not bool(loss.isfinite()), loss.device)
            if finite:
                with clock.collect() as times, clock.measure("backward", TORCH):
                    accelerator.backward(loss)
                backward = times.read()
            metrics = training.module.last_metrics
            assert metrics is not None
            measured.append(_Forward(loss.item(), kl_loss.item(), metrics, backward))
            if accelerator.sync_gradients:
                if finite:
                    grad_norm = _clip(training, parameters)
                    finite = bool(grad_norm.isfinite())
                if finite:
                    training.intact = False
                    training.optimizer.step()
                    training.scheduler.step()
                    training.intact = True
                training.optimizer.zero_grad()
    training.step += 1
    if (stale := training.module.parts.stale) is not None:
        stale.step = training.step
    training.samples += training.samples_per_step
    training.skipped += not finite
    training.skipped_in_row = 0 if finite else training.skipped_in_row + 1
    training.random = random_tensors()
    means = _means(gather_from_processes(measured))
    if finite:
        _after_update(training, means["kl_loss"])
    return {
        "step": training.step,
        **means,
        "grad_norm": grad_norm.item(),
        "learning_rate": learning_rate,
        "skipped": not finite,
        "seconds": time.perf_counter() - begin,
        "peak_memory_gb": max(gather_from_processes(peak_memory_gb(accelerator.device))),
    }


def _after_update(training: Training, kl_loss: float) -> None:
    """Update what depends on the weights: their average, and the weight of the KL term."""
    if training.average is not None:
        training.average.follow(training.parameters)
    target = training.module.settings.kl_target
    if target is not None:
        training.module.kl_weight = adapted_weight(training.module.kl_weight, kl_loss, target)


@dataclass(frozen=True)
class _Forward:
    """The result of one forward and backward pass."""

    loss: float
    kl_loss: float
    metrics: StepMetrics
    backward: dict[str, StageTime]


def _clip(training: Training, parameters: list[nn.Parameter]) -> Tensor:
    """Clip the gradient, and return its norm before clipping."""
    if training.replicated:
        average_gradients(parameters)
        return torch.nn.utils.clip_grad_norm_(parameters, training.settings.max_grad_norm)
    norm = training.accelerator.clip_grad_norm_(parameters, training.settings.max_grad_norm)
    assert norm is not None
    return torch.as_tensor(norm)


def _means(by_process: list[list[_Forward]]) -> dict[str, Any]:
    """Return one line of metrics from the forward passes of a step, in the order of the samples."""
    forwards = [forward for turn in zip(*by_process, strict=True) for forward in turn]
    per_sample: dict[str, list[float]] = defaultdict(list)
    for forward in forwards:
        for name, values in forward.metrics.per_sample.items():
            per_sample[name] += values
    kl: dict[int, list[float]] = defaultdict(list)
    for forward in forwards:
        for step, term in forward.metrics.kl.items():
            kl[step].append(term)
    # A reward's score is the mean of all samples that count, over forward passes and processes; there is none if no
    # sample counts.
    scores: dict[str, float] = {}
    for name in forwards[0].metrics.scores:
        sums, counts = zip(*(forward.metrics.scores[name] for forward in forwards), strict=True)
        scores[name] = sum(sums) / sum(counts) if sum(counts) else math.nan
    of_clips = [forward.metrics.sft_loss for forward in forwards if forward.metrics.sft_loss is not None]
    sft = _mean(of_clips) if of_clips else None
    return {
        "loss": _mean([forward.loss for forward in forwards]),
        "score": next(iter(scores.values())),
        "kl_loss": _mean([forward.kl_loss for forward in forwards]),
        **{name: _mean(values) for name, values in per_sample.items()},
        **scores,
        "sample_id": [name for forward in forwards for name in forward.metrics.sample_id],
        "kl_weight": forwards[0].metrics.kl_weight,
        **({} if sft is None else {"sft_loss": sft}),
        "kl": {str(step): _mean(values) for step, values in sorted(kl.items())},
        "stages": _stages(by_process[0]),
    }


def _stages(forwards: list[_Forward]) -> dict[str, dict[str, Any]]:
    """Return the milliseconds of the step in each stage, and the calls and milliseconds per backend; of process 0."""
    stages: dict[str, dict[str, Any]] = {}
    for forward in forwards:
        times: Mapping[str, StageTime] = {**forward.metrics.stages, **forward.backward}
        for name, time_ in times.items():
            stage = stages.setdefault(name, {"backend": "", "ms": 0.0, "backends": {}})
            stage["ms"] += time_.milliseconds
            for backend, (calls, milliseconds) in time_.by_backend.items():
                served = stage["backends"].setdefault(backend, {"calls": 0, "ms": 0.0})
                served["calls"] += calls
                served["ms"] += milliseconds
            stage["backend"] = ", ".join(stage["backends"])
    return stages


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
