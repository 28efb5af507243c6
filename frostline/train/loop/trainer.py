"""The training loop: accelerate for device and distribution, AdamW, metrics, checkpoints that nothing is lost from."""

from __future__ import annotations

import json
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
    RUN_FACTS,
    TRACKERS,
    VALIDATION,
    WORKING_DIR,
    JsonLines,
    claimed,
    read_lines,
)
from frostline.train.loop.saving import restore, save
from frostline.train.loop.sharding import sample_through_shards, shard_frozen_weights
from frostline.train.loop.signals import StopSignals
from frostline.train.loop.trackers import check_trackers, finish_trackers, start_trackers, track
from frostline.train.processes import any_process, gather_from_processes
from frostline.train.settings import TrainerSettings
from frostline.train.step.module import TrainingModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOutcome:
    """How a run ended.

    step: optimizer steps done, skipped: those without an update. stopped_by: a signal, if one. verdict: of the last
    validation, in a sentence; empty where there was none, or nothing to compare. stopped_by_judge: whether it ended
    because a judge fell (`train.stop_when_judge_falls`).
    """

    step: int
    skipped: int
    stopped_by: signal.Signals | None
    verdict: str = ""
    stopped_by_judge: bool = False


class Supervisor(Protocol):
    """Asked by all processes, once before each step: what manages the machines that they run on."""

    def stop_asked(self) -> signal.Signals | None:
        """Return the signal as on whose arrival the run is to save and end; one process that is told so is enough."""
        ...

    def save_asked(self) -> bool:
        """Return whether to save a checkpoint now, as a machine will soon be gone; the same on all processes."""
        ...

    def begun(self) -> None:
        """Learn, on the first process, that the run's folder is that of this run."""
        ...


@dataclass(frozen=True)
class RunOptions:
    """What is around the loop.

    resume: a verified checkpoint to go on from.
    overwrite: delete the run that the folder holds.
    restart: delete it where it began as this one does and has no checkpoint yet, as after a kill.
    num_workers: processes that decode videos ahead.
    config: the settings of the run, kept beside its files and in every checkpoint, and told to the trackers.
    facts: what else to keep in `run.json`.
    validate, validation_steps: called with the step at the start, the end and every `validation_steps`, on all
        processes; what it returns becomes a line of `validation.jsonl`, with the verdict on all lines so far.
    on_step: receives each line of `metrics.jsonl`.
    on_begin: called on the first process once the folder is that of this run: earlier the run may still be refused.
    supervisor: who else may ask the run to stop or to save.
    """

    resume: Checkpoint | None = None
    overwrite: bool = False
    restart: bool = False
    num_workers: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    validate: Callable[[int], dict[str, Any]] | None = None
    validation_steps: int = 1
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None
    on_begin: Callable[[], None] = lambda: None
    supervisor: Supervisor | None = None


def make_accelerator(settings: TrainerSettings, output_dir: Path, cpu: bool) -> Accelerator:
    """The accelerator of a run; what `accelerate launch` set up for several processes is taken up.

    Raises:
        ConfigError: a tracker is not installed.
    """
    check_trackers(settings.report_to)
    return Accelerator(
        cpu=cpu,
        mixed_precision=settings.mixed_precision,
        # As a plugin, which no variable of the environment overrides.
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
    """Train the LoRA of `module`; writes `metrics.jsonl` and `checkpoint-N/` as it goes, and `adapter/` at the end.

    With `ema_decay`, validation looks at the averaged adapter, which becomes `adapter_ema/`.

    SIGTERM or SIGINT: the running step is finished and saved, then the run ends. So it does, with the adapter, where
    judges fell at as many validations in a row as `stop_when_judge_falls` says; who resumes it goes on to the next
    validation, which may end it again.

    Raises:
        ConfigError: the folder holds another run, or the checkpoint is of another adapter. It is then as it was.
        CheckpointError: the folder is taken, or a checkpoint cannot be written or restored.
        DataError: a sample cannot be read; the steps before it are saved.
        TrainingError: too many steps in a row had no finite loss; what was trained before is saved.
    """
    options = options or RunOptions()
    if accelerator is None:
        on_cpu = module.model.device.type == "cpu"
        accelerator = make_accelerator(settings, output_dir, on_cpu)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            _check_start(output_dir, options)
            stack.enter_context(claimed(output_dir))
            # Once more: another run may have come in between.
            _check_start(output_dir, options)
        accelerator.wait_for_everyone()
        stop = stack.enter_context(StopSignals())
        training = _prepare(module, settings, accelerator)
        if options.resume is not None:
            restore(training, options.resume)
        # Whatever could be refused has been by now: what is in the folder is touched from here on.
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
    """Let the folder hold nothing of another run, and say that one has begun."""
    clear_run(output_dir)
    _write_facts(output_dir, options, origin(options.resume))
    _take_lines(output_dir, options.resume)


def _go_on(output_dir: Path, options: RunOptions) -> None:
    """Let the folder hold what the run goes on from, and nothing that came after."""
    assert options.resume is not None
    rotate(output_dir, None)
    clear_unfinished(output_dir)
    set_aside_after(output_dir, options.resume.step)
    _take_lines(output_dir, options.resume)
    _write_facts(output_dir, options, began_from(output_dir))


def _take_lines(output_dir: Path, resume: Checkpoint | None) -> None:
    if resume is not None:
        for name in (METRICS, VALIDATION):
            JsonLines(output_dir / name).keep_until(resume.step, resume.path.parent / name)


def _write_facts(output_dir: Path, options: RunOptions, began: str | None) -> None:
    facts = {PROGRAM: frostline.__version__, BEGAN_FROM: began, WORKING_DIR: str(Path.cwd()), **options.facts}
    # The first says whose folder it is, so it is written first.
    texts = {
        RUN_FACTS: json.dumps(facts, indent=2) + "\n",
        CONFIG: dump_yaml(options.config),
    }
    for name, text in texts.items():
        with atomic_write(output_dir / name) as part:
            part.write_text(text, encoding="utf-8")


def _prepare(module: TrainingModule, settings: TrainerSettings, accelerator: Accelerator) -> Training:
    # Most of transformers comes with it, which takes seconds: not before a run begins.
    from transformers.optimization import get_scheduler

    # Fresh noise differs between the processes; the data order has generators of its own.
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
    """The loop, and the files that it writes."""

    def __init__(self, training: Training, output_dir: Path, options: RunOptions, stop: StopSignals) -> None:
        self.training = training
        self.output_dir = output_dir
        self.options = options
        self.stop = stop
        self.is_main = training.accelerator.is_main_process
        self.metrics, self.validation = JsonLines(output_dir / METRICS), JsonLines(output_dir / VALIDATION)
        self.saved_step = training.step if options.resume is not None else None
        self.verdict, self.judged_out = "", False

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
        # What the validations came to, the first process alone knows.
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
            log.warning("step %d: the loss or its gradient is not finite; the weights stay as they are", training.step)
            if training.skipped_in_row >= settings.max_skipped_steps:
                raise TrainingError(
                    f"{training.skipped_in_row} steps in a row, up to step {training.step}, had no finite loss and "
                    "gradient: lower train.learning_rate, or look at the samples of these steps in metrics.jsonl"
                )
        if training.step % self.options.validation_steps == 0 or training.step == settings.max_train_steps:
            self._validate()
        if training.step % settings.checkpointing_steps == 0:
            self._save()

    def _validate(self) -> None:
        if self.options.validate is None:
            return
        with self._averaged():
            line = {"step": self.training.step, **self.options.validate(self.training.step)}
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
        """Where the module has the averaged adapter, if the run keeps one."""
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

    def _rescue(self) -> None:
        """Save the last whole step before an error ends the run."""
        # Other processes may wait for this one in the middle of a step: with them, the last checkpoint must do.
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
