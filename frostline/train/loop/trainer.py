"""The training loop: accelerate for device and distribution, AdamW, metrics, and exact checkpoints."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

import frostline
from frostline.atomic_io import atomic_write
from frostline.documents import dump_yaml
from frostline.errors import FrostlineError, TrainingError
from frostline.train.data.data_order import DataOrder
from frostline.train.data.dataset import Sample
from frostline.train.data.loader import Batches
from frostline.train.judging.verdict import with_verdict
from frostline.train.loop.average import AdapterAverage
from frostline.train.loop.checkpoint import Checkpoint, rotate, set_aside_after
from frostline.train.loop.optimizer_step import Training, optimizer_step
from frostline.train.loop.output_dir import began_from, begins_in, check_start, clear_run, clear_unfinished, origin
from frostline.train.loop.run_dir import (
    ADAPTER,
    ADAPTER_EMA,
    BEGAN_FROM,
    CONFIG,
    METRICS,
    PROGRAM,
    SESSIONS,
    TRACKERS,
    VALIDATION,
    WORKING_DIR,
    JsonLines,
    claimed,
    read_lines,
)
from frostline.train.loop.saving import restore, save
from frostline.train.loop.sessions import SessionRecord, read_sessions, write_facts
from frostline.train.loop.sharding import sample_through_shards, shard_frozen_weights
from frostline.train.loop.signals import StopSignals
from frostline.train.loop.trackers import check_trackers, finish_trackers, start_trackers, track
from frostline.train.processes import any_process, gather_from_processes
from frostline.train.settings import TrainerSettings
from frostline.train.step.module import TrainingModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOutcome:
    """The result of a run.

    Attributes:
        step: number of completed optimizer steps.
        skipped: number of steps without an update.
        stopped_by: the signal that stopped the run, if any.
        verdict: sentence about the last validation; empty if there was none, or nothing to compare.
        stopped_by_judge: whether the run ended because a judge fell (`train.stop_when_judge_falls`).
    """

    step: int
    skipped: int
    stopped_by: signal.Signals | None
    verdict: str = ""
    stopped_by_judge: bool = False


class Supervisor(Protocol):
    """A cluster manager that can request the run to stop or to save; all processes call it once before each step."""

    def stop_asked(self) -> signal.Signals | None:
        """Return the signal to handle as if it had been received, or None; one process with a signal stops all."""
        ...

    def save_asked(self) -> bool:
        """Return whether to save a checkpoint now, because a machine will be removed; equal on all processes."""
        ...

    def begun(self) -> None:
        """Record that the run now owns its output folder; called on the first process."""
        ...


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not affect a training step.

    Attributes:
        resume: a verified checkpoint to resume from.
        overwrite: delete the run in the folder.
        restart: delete the run in the folder if it has the same origin and no checkpoint yet, for example after a kill.
        num_workers: number of data-loading worker processes.
        config: the settings of the run, which are stored with its files and in every checkpoint, and passed to the
            trackers.
        facts: returns further entries of `run.json`; called when the run starts, saves and ends.
        validate: called with the number of completed steps, on all processes; its return value becomes a line of
            `validation.jsonl`, with the verdict on all lines so far.
        validation_steps: `validate` is called at the start, at the end and every `validation_steps` steps.
        on_step: called with each line of `metrics.jsonl`.
        on_begin: called on the first process once the run owns the folder; before that, the run may still be rejected.
        supervisor: can also request that the run stops or saves.
    """

    resume: Checkpoint | None = None
    overwrite: bool = False
    restart: bool = False
    num_workers: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Callable[[], Mapping[str, Any]] = dict
    validate: Callable[[int], dict[str, Any]] | None = None
    validation_steps: int = 1
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None
    on_begin: Callable[[], None] = lambda: None
    supervisor: Supervisor | None = None


def make_accelerator(settings: TrainerSettings, output_dir: Path, cpu: bool) -> Accelerator:
    """Return the accelerator of a run, including the configuration of `accelerate launch` for several processes.

    Raises:
        ConfigError: a tracker is not installed.
    """
    check_trackers(settings.report_to)
    return Accelerator(
        cpu=cpu,
        mixed_precision=settings.mixed_precision,
        # As a plugin, which environment variables do not override.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.gradient_accumulation_steps),
        log_with=list(settings.report_to) or None,
        project_dir=output_dir / TRACKERS,
    )


def train(
    module: TrainingModule,
    dataset: Dataset[Sample],
    settings: TrainerSettings,
    output_dir: Path,
    options: RunOptions | None = None,
    accelerator: Accelerator | None = None,
) -> TrainOutcome:
    """Train the LoRA of `module`; write `metrics.jsonl` and `checkpoint-N/` during the run, and `adapter/` at the end.

    With `ema_decay`, validation uses the averaged adapter, which is saved as `adapter_ema/`.

    On SIGTERM or SIGINT, the running step is finished and saved, then the run ends. The run also ends, and saves the
    adapter, if judges fall in `stop_when_judge_falls` consecutive validations; if it is resumed, it continues to the
    next validation, which may end it again.

    With one process, the last complete step is saved if an error ends the run.

    Raises:
        ConfigError: the folder contains another run, the checkpoint has another adapter, or the sharding is not
            supported (the folder is unchanged in these cases); or a tracker cannot be started.
        CheckpointError: the folder is in use, or a checkpoint cannot be written or restored.
        DataError: a sample cannot be read.
        TrainingError: too many consecutive steps had no finite loss and gradient, or a validation generated NaN or
            infinite frames.
    """
    options = options or RunOptions()
    if accelerator is None:
        on_cpu = module.model.device.type == "cpu"
        accelerator = make_accelerator(settings, output_dir, on_cpu)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            _check_start(output_dir, options)
            stack.enter_context(claimed(output_dir))
            # Check again: another run may have started in the meantime.
            _check_start(output_dir, options)
        accelerator.wait_for_everyone()
        stop = stack.enter_context(StopSignals())
        training = _prepare(module, settings, accelerator)
        if options.resume is not None:
            restore(training, options.resume)
        # All checks have passed; the folder is modified from here on.
        begins = begins_in(output_dir, options.resume)
        if accelerator.is_main_process and begins:
            _begin(output_dir, options)
        start_trackers(accelerator, options.config)
        stack.callback(finish_trackers, accelerator)
        if accelerator.is_main_process and not begins:
            _go_on(output_dir, options)
        if accelerator.is_main_process:
            options.on_begin()
            if options.supervisor is not None:
                options.supervisor.begun()
        return _Run(training, output_dir, options, stop).go(dataset)


def _check_start(output_dir: Path, options: RunOptions) -> None:
    if begins_in(output_dir, options.resume):
        check_start(output_dir, options.resume, options.overwrite, options.restart)


def _begin(output_dir: Path, options: RunOptions) -> None:
    """Delete an earlier run in the folder, and record that a new one has started."""
    clear_run(output_dir)
    write_facts(output_dir, _own_facts(options, origin(options.resume)))
    _write_config(output_dir, options)
    _take_lines(output_dir, options.resume)


def _go_on(output_dir: Path, options: RunOptions) -> None:
    """Restore the folder to the checkpoint: delete incomplete files and later lines, and rename later checkpoints."""
    assert options.resume is not None
    rotate(output_dir, None)
    clear_unfinished(output_dir)
    set_aside_after(output_dir, options.resume.step)
    _take_lines(output_dir, options.resume)
    earlier = read_sessions(output_dir)
    write_facts(output_dir, {**_own_facts(options, began_from(output_dir)), **({SESSIONS: earlier} if earlier else {})})
    _write_config(output_dir, options)


def _take_lines(output_dir: Path, resume: Checkpoint | None) -> None:
    if resume is not None:
        for name in (METRICS, VALIDATION):
            JsonLines(output_dir / name).keep_until(resume.step, resume.path.parent / name)


def _own_facts(options: RunOptions, began: str | None) -> dict[str, Any]:
    return {PROGRAM: frostline.__version__, BEGAN_FROM: began, WORKING_DIR: str(Path.cwd()), **options.facts()}


def _write_config(output_dir: Path, options: RunOptions) -> None:
    with atomic_write(output_dir / CONFIG) as part:
        part.write_text(dump_yaml(options.config), encoding="utf-8")


def _prepare(module: TrainingModule, settings: TrainerSettings, accelerator: Accelerator) -> Training:
    # Imported here, because it imports most of transformers, which takes seconds.
    from transformers.optimization import get_scheduler

    # Fresh noise differs between processes; the data order has its own generators.
    set_seed(settings.seed, device_specific=True)
    optimizer = torch.optim.AdamW(
        module.trainable_parameters().values(),
        settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    module.runtime.agree_across_processes()
    sharded = shard_frozen_weights(module, accelerator)
    model, optimizer = accelerator.prepare(module, optimizer)
    if sharded:
        sample_through_shards(module)
    scheduler = get_scheduler(settings.lr_scheduler_type, optimizer, settings.lr_warmup_steps, settings.max_train_steps)
    assert isinstance(scheduler, LambdaLR)
    parameters = module.trainable_parameters()
    average = None if settings.ema_decay is None else AdapterAverage(settings.ema_decay, parameters)
    return Training(accelerator, module, model, optimizer, scheduler, parameters, settings, sharded, average)


class _Run:
    """The training loop and the files that it writes."""

    def __init__(self, training: Training, output_dir: Path, options: RunOptions, stop: StopSignals) -> None:
        self.training = training
        self.output_dir = output_dir
        self.options = options
        self.stop = stop
        self.is_main = training.accelerator.is_main_process
        self.metrics, self.validation = JsonLines(output_dir / METRICS), JsonLines(output_dir / VALIDATION)
        self.saved_step = training.step if options.resume is not None else None
        self.verdict, self.judged_out = "", False
        self.session = SessionRecord(output_dir, training.step, options.facts) if self.is_main else None

    def go(self, dataset: Dataset[Sample]) -> TrainOutcome:
        training, settings = self.training, self.training.settings
        order = DataOrder(
            len(dataset),  # type: ignore[arg-type]
            settings.per_device_train_batch_size,
            settings.seed,
            training.accelerator.num_processes,
            training.accelerator.process_index,
            training.samples,
        )
        batches = Batches(dataset, order, self.options.num_workers)
        try:
            if training.step == 0:
                self._validate()
            while training.step < settings.max_train_steps and not self._asked_to_stop():
                self._one_step(batches)
        except Exception:
            self._rescue()
            raise
        finally:
            batches.close()
        self._save()
        if (training.step >= settings.max_train_steps or self.judged_out) and self.is_main:
            training.module.save_adapter(self.output_dir / ADAPTER)
            if training.average is not None:
                with self._averaged():
                    training.module.save_adapter(self.output_dir / ADAPTER_EMA)
        self._note_session()
        # Only the first process has the results of all validations.
        verdict, judged_out = gather_from_processes((self.verdict, self.judged_out))[0]
        return TrainOutcome(training.step, training.skipped, self.stop.requested, verdict, judged_out)

    def _one_step(self, batches: Batches) -> None:
        training, settings = self.training, self.training.settings
        line = optimizer_step(training, batches)
        if self.is_main:
            self.metrics.append(line)
            track(training.accelerator, line, "train")
            self.options.on_step(line)
        if line["skipped"]:
            log.warning("step %d: the loss or its gradient is not finite; the weights are not changed", training.step)
            if training.skipped_in_row >= settings.max_skipped_steps:
                raise TrainingError(
                    f"{training.skipped_in_row} consecutive steps, up to step {training.step}, had no "
                    "finite loss and gradient: lower train.learning_rate, or check the samples of these "
                    "steps in metrics.jsonl"
                )
        if training.step % self.options.validation_steps == 0 or training.step == settings.max_train_steps:
            self._validate()
        if training.step % settings.checkpointing_steps == 0:
            self._save()

    def _validate(self) -> None:
        if self.options.validate is None:
            return
        with self._averaged(), self.training.module.runtime.clock.collect() as times:
            line = {"step": self.training.step, **self.options.validate(self.training.step)}
        if self.session is not None:
            self.session.count_validation(times.read())
        if self.is_main:
            line, verdict = with_verdict(read_lines(self.validation.path), line)
            self.verdict = verdict.sentence
            if verdict.sentence:
                log.log(logging.WARNING if verdict.is_bad else logging.INFO, "step %d: %s", line["step"], self.verdict)
            limit, settings = self.training.settings.stop_when_judge_falls, self.training.settings
            if limit is not None and verdict.falling_in_row >= limit and self.training.step < settings.max_train_steps:
                self.judged_out = line["verdict"]["stops"] = True
            self.validation.append(line)
            track(self.training.accelerator, line, "validation")

    def _averaged(self) -> AbstractContextManager[None]:
        """Use the averaged adapter within the block, if the run has one."""
        average, parameters = self.training.average, self.training.parameters
        return nullcontext() if average is None else average.in_place_of(parameters)

    def _save(self) -> None:
        if self.training.step in (0, self.saved_step):
            return
        if self.is_main:
            self.metrics.sync()
            self.validation.sync()
        save(self.training, self.output_dir, self.options.config)
        self.saved_step = self.training.step
        self._note_session()

    def _note_session(self) -> None:
        if self.session is not None:
            self.session.write(self.training.step)

    def _rescue(self) -> None:
        """Save the last complete step before an error ends the run."""
        # Other processes may be waiting in the middle of a step: then only the last checkpoint is available.
        if self.training.accelerator.num_processes > 1 or not self.training.intact:
            return
        try:
            self._save()
        except FrostlineError as error:
            log.warning("%s", error)

    def _asked_to_stop(self) -> bool:
        if (supervisor := self.options.supervisor) is not None:
            self.stop.requested = self.stop.requested or supervisor.stop_asked()
            if supervisor.save_asked():
                self._save()
        wanted = self.stop.requested is not None or self.judged_out
        return any_process(wanted, self.training.accelerator.device)
