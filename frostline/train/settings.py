"""Settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from frostline.config import OTHERS, BaseAdapter, QuantizationSettings, Settings, Sharding
from frostline.errors import ConfigError
from frostline.models.video_shape import Geometry, VideoShape
from frostline.rewards.config import RewardEntry
from frostline.runtime.backends import TORCH, backend_names
from frostline.stages.families import DEFAULT_GEOMETRY, family_of
from frostline.stages.shapes import ShapeRange, parse_shapes
from frostline.train.data.needs import DEFAULT_NEEDS, SampleNeeds
from frostline.train.step_settings import TrainingModuleSettings

# Importing torch takes seconds; mistakes in a configuration file are reported without importing it.
if TYPE_CHECKING:
    import torch

    from frostline.train.data.dataset import VideoPromptDataset

Tracker = Literal["tensorboard", "wandb", "trackio"]
LrSchedulerType = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


class TrainerSettings(Settings):
    """Duration, optimizer and outputs of training."""

    learning_rate: float = Field(default=2.5e-6, gt=0, description="AdamW learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW beta1")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW beta2")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW epsilon")
    lr_scheduler_type: LrSchedulerType = Field(default="constant_with_warmup", description="learning rate schedule")
    lr_warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate increases from 0")
    max_train_steps: int = Field(default=100, ge=1, description="optimizer steps")
    per_device_train_batch_size: int = Field(default=1, ge=1, description="samples per forward pass and process")
    gradient_accumulation_steps: int = Field(
        default=1,
        ge=1,
        description="forward passes per optimizer step, all with equal weight, regardless of how many "
        "samples a reward could score",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="maximum gradient norm")
    mixed_precision: Literal["no", "bf16"] = Field(
        default="no",
        description="bf16: frozen weights and computation in bf16, LoRA weights and their optimizer in fp32",
    )
    seed: int = Field(default=0, ge=0, description="seed of data order, LoRA initialisation and fresh noise")
    max_skipped_steps: int = Field(
        default=10, ge=1, description="stop after N consecutive steps whose loss or gradient is NaN or infinite"
    )
    checkpointing_steps: int = Field(default=50, ge=1, description="write checkpoint-STEP every N steps")
    save_total_limit: int | None = Field(default=None, ge=1, description="number of checkpoints to keep")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of an exponential moving average of the adapter, which validation uses and "
        "which is saved as adapter_ema/",
    )
    stop_when_judge_falls: int | None = Field(
        default=None,
        ge=1,
        description="end the run after N consecutive validations in which a judge of validation.judges falls",
    )
    report_to: tuple[Tracker, ...] = Field(
        default=(), description="trackers in addition to metrics.jsonl: tensorboard, wandb, trackio, or none"
    )

    @property
    def weight_dtype(self) -> torch.dtype:
        """Return the floating-point type of the frozen weights."""
        import torch

        return torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_reads_no_as_false(cls, value: Any) -> Any:
        return "no" if value is False else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker_or_none(cls, value: Any) -> Any:
        """Accept `none`, one name, and `a,b` as lists."""
        if value is None or value == "none":
            return ()
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


class VideoSettings(Settings):
    """Source and size of videos with prompts."""

    source: Path | None = Field(
        default=None,
        description="metadata.csv, .json or .jsonl with prompt, video and, optionally, reference; a folder of "
        "captioned videos; or a .txt file of prompts",
    )
    num_frames: int = Field(default=17, ge=5, description="frames of every sample; most models take 4k+1")
    height: int | None = Field(
        default=None,
        description="height in pixels, a multiple of 16 or 32, depending on the model; if not given, each video "
        "keeps its size, see max_pixels",
    )
    width: int | None = Field(default=None, description="width in pixels; set together with height")
    max_pixels: int = Field(default=480 * 832, description="maximum height times width, if these are not given")
    frame_stride: int = Field(default=1, ge=1, description="use every Nth frame")
    allow_outside: bool = Field(
        default=False,
        description="let metadata name videos and references, and captions link to files, outside the source's folder",
    )

    def check_cut(self, geometry: Geometry) -> None:
        """Raise a ConfigError if a model with this geometry does not support these videos."""
        geometry.check_cut(self.num_frames, self.height, self.width, self.max_pixels, self.frame_stride)

    def shape(self, geometry: Geometry, batch_size: int, sizes: Collection[tuple[int, int]] = ()) -> VideoShape:
        """Return the largest shape that a batch can have.

        Args:
            sizes: heights and widths of the videos before cropping, used if `height` and `width` are not set; without
                them, a square with the maximum area is assumed.
        """
        height, width = self.height, self.width
        if height is None or width is None:
            height = width = geometry.square_side(self.max_pixels)
            if sizes:
                from frostline.train.data.cutting import size_within

                cut = (size_within(*size, self.max_pixels, geometry.spatial_multiple) for size in sizes)
                height, width = max(cut, key=math.prod)
        return VideoShape(batch_size, self.num_frames, height, width)

    def open(self, geometry: Geometry = DEFAULT_GEOMETRY, needs: SampleNeeds = DEFAULT_NEEDS) -> VideoPromptDataset:
        """Open the dataset with these settings.

        Args:
            geometry: the video sizes that the model supports.
            needs: requirements of model and rewards on samples.
        Raises:
            ConfigError: the model does not support these videos, or there is no source.
            DataError: the source cannot be read, or all rows are invalid.
        """
        from frostline.train.data.dataset import VideoPromptDataset

        if self.source is None:
            # Validation is skipped without a source; training needs one.
            raise ConfigError("data.source: required: a metadata file, a folder of captioned videos, or prompts (.txt)")
        cut = self.model_dump(include={"num_frames", "height", "width", "max_pixels", "frame_stride", "allow_outside"})
        return VideoPromptDataset(self.source, **cut, geometry=geometry, needs=needs)


class DataSettings(VideoSettings):
    """The training data."""

    num_workers: int = Field(default=0, ge=0, description="data-loading worker processes; 0 loads in the main process")
    bad_rows: Literal["error", "skip"] = Field(
        default="error", description="invalid dataset rows: raise an error, or skip them"
    )


class ValidationSettings(VideoSettings):
    """Validation samples, not used in training: generated and scored periodically, with fixed noise."""

    steps: int = Field(default=50, ge=1, description="validate every N steps, and at the start and the end")
    num_videos: int = Field(default=5, ge=1, description="number of samples, from the first rows of the source")
    batch_size: int = Field(default=1, ge=1, description="videos generated together, per process")
    noise_seed: int = Field(default=0, ge=0, description="seed of the start noise")
    lossless: bool = Field(
        default=False, description="also write lossless clips, so that `frostline score` reproduces the scores"
    )
    judges: tuple[SerializeAsAny[RewardEntry], ...] = Field(
        default=(),
        description="rewards that score validation samples but are not trained on, each by its type; their "
        "weight, baseline, scale and cap are ignored",
    )


class PlanSettings(Settings):
    """Backends of the frozen stages."""

    backend: str = Field(
        default="auto",
        description=f"auto (the fastest verified engine, torch if none is faster), {TORCH}, or a backend: "
        f"{', '.join(backend_names())}",
    )
    stages: dict[str, str] = Field(
        default={}, description="backends of single stages, for example {vae_encoder: torch}"
    )
    engines: Path = Field(default=Path("engines"), description="the engine store")
    strict: bool = Field(default=False, description="stop if an engine fails, instead of falling back to torch")
    min_shapes: str = Field(default="", description="minimum shapes of engines, see `frostline export --min-shapes`")
    opt_shapes: str = Field(default="", description="typical shapes of engines, see `frostline export --opt-shapes`")
    max_shapes: str = Field(default="", description="maximum shapes of engines, see `frostline export --max-shapes`")

    def shape_range(self, geometry: Geometry) -> ShapeRange:
        """Return the range of shapes that the engines support.

        Raises:
            ConfigError: a text is invalid.
        """
        return parse_shapes(self.min_shapes, self.opt_shapes, self.max_shapes, geometry)

    def as_plan(self) -> str | dict[str, str]:
        """Return the plan for a `Runtime`."""
        return {OTHERS: self.backend, **self.stages} if self.stages else self.backend


class OffloadSettings(Settings):
    """Offloading of frozen weights to main memory, block by block."""

    blocks: int | Literal["auto"] = Field(
        default=0,
        description="number of blocks of each denoiser, evenly spaced, whose frozen weights are offloaded to main "
        "memory and copied to the GPU while the preceding block computes, in forward and in backward: same results, "
        "slower; auto: the fewest blocks with which the run fits in memory",
    )

    @field_validator("blocks")
    @classmethod
    def _is_no_less_than_none(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError(f"must be auto or a number of blocks, at least 0, not {value}")
        return value

    @property
    def number(self) -> int:
        """Return the number of blocks; 0 for `auto`, which is replaced by a number before the model is loaded."""
        return 0 if self.blocks == "auto" else self.blocks


class MemorySettings(Settings):
    """The machine for which `--dry-run` and `fit` plan the memory."""

    fit: Literal["auto", "never"] = Field(
        default="never",
        description="auto: if the run does not fit the devices, make the least costly changes to its "
        "settings and log them; changes that affect what is trained are warnings",
    )

    num_processes: int = Field(default=1, ge=1, description="number of processes, one per device")
    sharding: Sharding = Field(default="ddp", description="sharding to plan for: ddp (none), zero2, zero3 or fsdp")
    device_gb: float | None = Field(
        default=None, gt=0, description="memory of one device in GB (10^9 bytes); that of this machine if not given"
    )


class RunSettings(TrainingModuleSettings, QuantizationSettings):
    """A training run: the step (`num_inference_steps` … `rewards`), and all other settings."""

    model: str = Field(default="tiny", description="tiny, tiny-moe, tiny-ti2v, or the folder of a checkpoint")
    base_adapters: tuple[BaseAdapter, ...] = Field(
        default=(),
        description="adapters to merge into the denoiser when the model is loaded, each with a path, a "
        "scale (1 if not given) and, in a model with two experts, expert (low or high); the "
        "LoRA is trained on top of them",
    )
    init_adapter: Path | None = Field(
        default=None,
        description="initial LoRA, a PEFT folder or a .safetensors file, with the rank, scale and layers "
        "of lora; ignored when resuming",
    )
    precompute: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="when to compute the frozen outputs of all samples before the first step, with one stage at a time "
        "in memory: always, never, or auto (if training then does not need stages whose weights are more than a tenth "
        "of the device's memory, and cache_bytes is sufficient)",
    )
    output_dir: Path = Field(default=Path("runs/train"), description="output folder of the run")
    overwrite_output_dir: bool = Field(default=False, description="delete an existing run in output_dir")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if available")
    data: DataSettings = DataSettings()
    validation: ValidationSettings = ValidationSettings()
    train: TrainerSettings = TrainerSettings()
    plan: PlanSettings = PlanSettings()
    offload: OffloadSettings = OffloadSettings()
    memory: MemorySettings = MemorySettings()

    @model_validator(mode="after")
    def _who_is_to_stop_the_run_is_there(self) -> Self:
        judges = () if self.validation.source is None else self.validation.judges
        if self.train.stop_when_judge_falls is not None and not judges:
            raise ValueError(
                "train.stop_when_judge_falls: requires a judge in validation.judges, and samples in validation.source"
            )
        return self

    @model_validator(mode="after")
    def _blocks_that_wait_are_whole(self) -> Self:
        if self.offload.blocks != 0:
            if self.torch_compile:
                raise ValueError("offload.blocks: offloaded blocks cannot be compiled: remove torch_compile")
            if self.memory.num_processes > 1 or self.memory.sharding != "ddp":
                raise ValueError(
                    "offload.blocks: supports one process without sharding only: remove it, or set "
                    "memory.num_processes to 1 and memory.sharding to ddp"
                )
        return self

    @model_validator(mode="after")
    def _the_model_takes_such_cuts(self) -> Self:
        geometry = family_of(self.model).GEOMETRY
        for name in ("data", "validation"):
            try:
                getattr(self, name).check_cut(geometry)
            except ConfigError as error:
                raise ValueError(f"{name}: {error}") from None
        return self

    def video_shape(self, geometry: Geometry = DEFAULT_GEOMETRY, sizes: Collection[tuple[int, int]] = ()) -> VideoShape:
        """Return the shape of a step in one process; see `VideoSettings.shape`."""
        return self.data.shape(geometry, self.train.per_device_train_batch_size, sizes)

    @property
    def frozen_cache_dir(self) -> Path:
        """Return the cache folder for frozen outputs, on disk so that every process and a resumed run can use them."""
        return self.output_dir / "cache" if self.cache_dir is None else self.cache_dir
