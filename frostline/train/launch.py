"""Run `frostline train` and `frostline cache` with given settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.utils.data import Dataset, Subset

from frostline.config import AUTO, CHECKPOINTING
from frostline.errors import DataError
from frostline.models.video_shape import Geometry, VideoShape
from frostline.progress import Progress
from frostline.rewards.build import JUDGES, resolve
from frostline.runtime.device import resolve_device, total_bytes
from frostline.runtime.malloc import keep_freed_memory
from frostline.runtime.runtime import Runtime
from frostline.stages.families import DEFAULT_GEOMETRY, family_of
from frostline.terminal.logs import LogFile, logged_to_file
from frostline.train.config_file import dump_settings
from frostline.train.data.dataset import BadRow, DataCheck, Sample, VideoPromptDataset
from frostline.train.data.needs import DEFAULT_NEEDS, SampleNeeds
from frostline.train.fit_memory import fit_to_memory
from frostline.train.judging.judge import Judge, build_judges
from frostline.train.loop.checkpoint import Checkpoint, samples_dealt
from frostline.train.loop.output_dir import check_writable
from frostline.train.loop.resume import changed_settings
from frostline.train.loop.run_dir import LOG
from frostline.train.loop.trainer import RunOptions, Supervisor, TrainOutcome, make_accelerator, train
from frostline.train.loop.validation import Validation, starts_of, validate
from frostline.train.precompute.prepare import Place, Precomputed, precompute
from frostline.train.precompute.preview import count_samples
from frostline.train.processes import gather_from_processes
from frostline.train.report.page import write_report
from frostline.train.run_facts import run_facts
from frostline.train.settings import RunSettings
from frostline.train.step.module import TrainingModule
from frostline.train.step_settings import TrainingModuleSettings
from frostline.train.validate_settings import check_offload, check_output, problems

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_LISTED_ROWS = 20


def run_training(
    settings: RunSettings, resume: str | None, progress: Progress, supervisor: Supervisor | None = None
) -> TrainOutcome:
    """Check the data, load the model, train, and write the report.

    Args:
        settings: the settings of the run.
        resume: the checkpoint to resume from, see `find_resume`; None starts a new run.
        progress: shows the progress.
        supervisor: can request the run to stop or to save a checkpoint.
    Returns:
        The outcome of the run.
    Raises:
        FrostlineError: a setting, the data or the model is invalid; saved files are kept.
    """
    wants_cpu = resolve_device(settings.device).type == "cpu"
    accelerator = make_accelerator(settings.train, settings.output_dir, wants_cpu)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with logged_to_file(accelerator.is_main_process) as log_file:
        return _run_training(settings, resume, progress, accelerator, log_file, supervisor)


def _run_training(
    settings: RunSettings,
    resume: str | None,
    progress: Progress,
    accelerator: Accelerator,
    log_file: LogFile,
    supervisor: Supervisor | None,
) -> TrainOutcome:
    check_offload(settings.offload.blocks, _device_of(accelerator).type == "cpu", accelerator.num_processes)
    checkpoint = _from_first_process(accelerator, lambda: _check(settings, resume))
    settings, dataset, validation, sizes = _open_fitted(settings, accelerator, progress)
    device = _device_of(accelerator)
    place = _place_of(checkpoint, accelerator.num_processes)
    prepared = precompute(settings, dataset, validation, device, progress, place)
    with progress.task(f"load {settings.model}"):
        module = build_module(settings, device)
        module.runtime.idle = prepared.stages
        if validation is not None:
            validation = replace(validation, judges=load_judges(settings, module))
    if checkpoint is None and settings.init_adapter is not None:
        module.load_adapter(settings.init_adapter)
    _settle_checkpointing(module, settings.video_shape(module.model.geometry, sizes))
    _log_start(settings, accelerator, len(dataset), checkpoint)  # type: ignore[arg-type]
    with progress.bar("train the LoRA", settings.train.max_train_steps) as bar:
        bar.advance(checkpoint.step if checkpoint else 0)
        timed = 0

        def on_step(line: dict[str, Any]) -> None:
            nonlocal timed
            bar.describe(*_describe(line))
            bar.advance(1)
            log.debug("step %d: %s; %s", line["step"], ", ".join(_describe(line)), _stage_seconds(line))
            timed = _log_plan(module.runtime, timed)

        def validate_at(step: int) -> dict[str, Any]:
            assert validation is not None
            starts = len(validation.starts)
            seen = 0

            def on_starts(done: int) -> None:
                nonlocal seen
                seen += done
                bar.describe(f"validation sample {min(seen, starts)} of {starts}")

            return validate(module, validation, step, settings.output_dir, on_starts)

        options = RunOptions(
            resume=checkpoint,
            overwrite=settings.overwrite_output_dir,
            restart=resume is not None,
            num_workers=settings.data.num_workers,
            config=dump_settings(settings),
            facts=run_facts(module, settings, () if validation is None else validation.judges),
            validate=None if validation is None else validate_at,
            validation_steps=settings.validation.steps,
            on_step=on_step,
            on_begin=lambda: log_file.open(settings.output_dir / LOG),
            supervisor=supervisor,
        )
        outcome = train(module, dataset, settings.train, settings.output_dir, options, accelerator)
    if accelerator.is_main_process:
        write_report(settings.output_dir)
    accelerator.state.destroy_process_group()
    return outcome


def run_precompute(settings: RunSettings, progress: Progress, batch_size: int | None = None) -> Precomputed:
    """Compute the frozen outputs of all samples and store them in the cache, regardless of `settings.precompute`.

    Args:
        settings: the settings of the run.
        progress: shows the progress.
        batch_size: samples per batch; None for the batches of the run.
    Returns:
        The result of the computation.
    Raises:
        FrostlineError: a setting, the data or the model is invalid; outputs that were already stored are kept.
    """
    settings = settings.model_copy(update={"precompute": "always"})
    without_trackers = settings.train.model_copy(update={"report_to": ()})
    wants_cpu = resolve_device(settings.device).type == "cpu"
    accelerator = make_accelerator(without_trackers, settings.output_dir, wants_cpu)
    if accelerator.device.type == "cpu":
        keep_freed_memory()

    def check() -> None:
        check_offload(settings.offload.blocks, accelerator.device.type == "cpu", accelerator.num_processes)
        for problem in problems(settings, runs=True):
            raise problem
        check_writable(settings.frozen_cache_dir)
        family_of(settings.model).check_files(settings.model)

    _from_first_process(accelerator, check)
    settings, dataset, validation, _ = _open_fitted(settings, accelerator, progress)
    place = _place_of(None, max(accelerator.num_processes, settings.memory.num_processes))
    done = precompute(settings, dataset, validation, _device_of(accelerator), progress, place, batch_size)
    accelerator.state.destroy_process_group()
    return done


def _open_fitted(
    settings: RunSettings, accelerator: Accelerator, progress: Progress
) -> tuple[RunSettings, Dataset[Sample], Validation | None, frozenset[tuple[int, int]]]:
    """Return the settings after `memory.fit` and `offload.blocks: auto`, and the data with these settings."""
    dataset, validation, sizes = _open_data(settings, accelerator, progress)
    if settings.memory.fit == "never" and settings.offload.blocks != AUTO:
        return settings, dataset, validation, sizes
    device = _device_of(accelerator)
    # The smallest device counts, so that all processes use the same settings.
    device_gb = settings.memory.device_gb or min(gather_from_processes(total_bytes(device))) / 1e9
    sharding = "fsdp" if accelerator.distributed_type == DistributedType.FSDP else "ddp"
    machine = {"num_processes": accelerator.num_processes, "sharding": sharding, "device_gb": device_gb}
    there = settings.memory.model_copy(update=machine)
    with progress.task("plan the memory"):
        samples = count_samples(settings, dataset, validation)
        fitted = fit_to_memory(settings, there, device.type == "cpu", samples, sizes)
    accelerator.gradient_accumulation_steps = fitted.train.gradient_accumulation_steps
    if fitted.data != settings.data:
        dataset, validation, sizes = _open_data(fitted, accelerator, progress)
    return fitted, dataset, validation, sizes


def _open_data(
    settings: RunSettings, accelerator: Accelerator, progress: Progress
) -> tuple[Dataset[Sample], Validation | None, frozenset[tuple[int, int]]]:
    """Return the training samples, the validation samples, and the (height, width) of the training videos."""
    spec = family_of(settings.model).read_spec(settings.model)
    rewards, judges = resolve(settings.rewards), resolve(settings.validation.judges, JUDGES)
    needs = SampleNeeds.of(spec.name, spec.needs_image, rewards, settings.sft_weight > 0)
    dataset, sizes = _training_data(settings, accelerator, progress, spec.geometry, needs)
    needs = SampleNeeds.of(spec.name, spec.needs_image, (*rewards, *judges))
    return dataset, open_validation(settings, spec.geometry, needs), sizes


def _device_of(accelerator: Accelerator) -> torch.device:
    """Return the device of the process; always "cpu" for a CPU, without an index."""
    return torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device


def _place_of(checkpoint: Checkpoint | None, processes: int) -> Place:
    if checkpoint is None:
        return Place(processes=processes)
    return Place(checkpoint.step, samples_dealt(checkpoint), processes)


def _check(settings: RunSettings, resume: str | None) -> Checkpoint | None:
    """Check settings, output folder and model files, and return the checkpoint to resume from."""
    for problem in problems(settings, runs=True):
        raise problem
    checkpoint = check_output(settings, resume)
    family_of(settings.model).check_files(settings.model)
    return checkpoint


def _settle_checkpointing(module: TrainingModule, shape: VideoShape) -> None:
    """Choose the same gradient checkpointing in all processes, because they must gather shards at the same time."""
    module.settle_checkpointing(shape)
    if module.gradient_checkpointing is not None:
        module.checkpoint(max(gather_from_processes(module.gradient_checkpointing), key=CHECKPOINTING.index))


def build_module(settings: RunSettings, device: torch.device) -> TrainingModule:
    """Build the training module of these settings. The LoRA weights are initialised with the seed."""
    torch.manual_seed(settings.train.seed)
    step = settings.model_dump(include=set(TrainingModuleSettings.model_fields))
    step["cache_dir"] = settings.frozen_cache_dir
    plan = settings.plan
    return TrainingModule.from_pretrained(
        settings.model,
        engines=plan.engines,
        plan=plan.as_plan(),
        strict=plan.strict,
        shapes=plan.shape_range(family_of(settings.model).GEOMETRY),
        dtype=settings.train.weight_dtype,
        device=device,
        base_adapters=settings.base_adapters,
        quantization=settings.quantization,
        text_encoder_quantization=settings.text_encoder_quantization,
        offload_blocks=settings.offload.number,
        **step,
    )


def load_judges(settings: RunSettings, module: TrainingModule) -> tuple[Judge, ...]:
    """Load the judges of a run on the device of its module."""
    plan = settings.plan
    return build_judges(
        settings.validation.judges,
        module,
        plan=plan.as_plan(),
        engines=plan.engines,
        strict=plan.strict,
        shapes=plan.shape_range(family_of(settings.model).GEOMETRY),
    )


def check_rows(dataset: VideoPromptDataset, bad_rows: str, found: list[BadRow]) -> Dataset[Sample]:
    """Return the dataset without invalid rows, if they may be skipped.

    Raises:
        DataError: invalid rows are an error, or all rows are invalid.
    """
    if not found:
        return dataset
    listed = "\n".join(f"  {row}" for row in found[:_LISTED_ROWS])
    more = f"\n  … and {len(found) - _LISTED_ROWS} more" if len(found) > _LISTED_ROWS else ""
    message = f"{len(found)} of {len(dataset)} rows are invalid:\n{listed}{more}"
    if bad_rows == "error":
        raise DataError(f"{message}\nfix these rows, or set data.bad_rows to skip")
    bad = {row.sample_id for row in found}
    good = [index for index, name in enumerate(dataset.sample_ids) if name not in bad]
    if not good:
        raise DataError(message)
    log.warning("%s", message)
    return Subset(dataset, good)


def open_validation(
    settings: RunSettings, geometry: Geometry = DEFAULT_GEOMETRY, needs: SampleNeeds = DEFAULT_NEEDS
) -> Validation | None:
    """Return the validation samples; None if the settings have no validation data.

    Raises:
        DataError: the source cannot be read, or one of the samples is invalid.
    """
    validation = settings.validation
    if validation.source is None:
        return None
    dataset = validation.open(geometry, needs)
    made = starts_of(validation, dataset)
    unusable = [row for row in dataset.validate() if row.sample_id in dataset.sample_ids[: len(made.starts)]]
    if unusable:
        raise DataError(f"validation: {unusable[0]}")
    return made


def _training_data(
    settings: RunSettings, accelerator: Accelerator, progress: Progress, geometry: Geometry, needs: SampleNeeds
) -> tuple[Dataset[Sample], frozenset[tuple[int, int]]]:
    dataset = settings.data.open(geometry, needs)

    def look() -> DataCheck:
        with progress.task("check the data"):
            return dataset.check()

    check = _from_first_process(accelerator, look)
    if check.short:
        log.warning("%s", dataset.describe_padding(check.short))
    return check_rows(dataset, settings.data.bad_rows, check.bad), check.sizes


def _from_first_process(accelerator: Accelerator, compute: Callable[[], _T]) -> _T:
    """Call `compute` on the first process, and return its result on all processes."""
    return gather_from_processes(compute() if accelerator.is_main_process else None)[0]


def _log_start(settings: RunSettings, accelerator: Accelerator, samples: int, checkpoint: Checkpoint | None) -> None:
    trainer, processes = settings.train, accelerator.num_processes
    per_step = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * processes
    log.info(
        "%d samples, %d per step (%d processes, batch size %d, accumulation %d): %d steps use each sample %.3g times",
        samples,
        per_step,
        processes,
        trainer.per_device_train_batch_size,
        trainer.gradient_accumulation_steps,
        trainer.max_train_steps,
        per_step * trainer.max_train_steps / samples,
    )
    if checkpoint is not None:
        changes = changed_settings(checkpoint, settings)
        listed = "".join(f"\n  {name}: {now} (was {before})" for name, (before, now) in changes.items())
        log.info("resuming from %s%s", checkpoint.path, f" with other settings:{listed}" if listed else "")


def _log_plan(runtime: Runtime, logged: int) -> int:
    """Log the choices of `auto` if it has timed more than `logged` shapes; return the number of timed shapes."""
    timed = runtime.trials.timed
    if timed > logged:
        stages: dict[str, list[str]] = {}
        for name, choice in runtime.plan.items():
            stages.setdefault(choice.backend, []).append(name)
        served = "; ".join(f"{backend} runs {', '.join(names)}" for backend, names in stages.items())
        log.info("auto timed backends at %d shapes: %s", timed, served)
    return timed


def _describe(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the texts next to the progress bar, the most important first."""
    score = "-" if math.isnan(line["score"]) else f"{line['score']:.3f}"
    return f"score {score}", f"KL {line['kl_loss']:.4f}", f"{line['seconds']:.1f} s/step"


def _stage_seconds(line: Mapping[str, Any]) -> str:
    """Return the seconds of each stage of a step, the slowest first."""
    stages = sorted(line["stages"].items(), key=lambda stage: -stage[1]["ms"])
    return ", ".join(f"{name} {stage['ms'] / 1000:.2f} s" for name, stage in stages)
