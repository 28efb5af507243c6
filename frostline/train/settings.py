"""Settings of a training run: what its file says."""

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

# torch takes seconds to import: a mistake in a configuration file is to be told before.
if TYPE_CHECKING:
    import torch

    from frostline.train.data.dataset import VideoPromptDataset

Tracker = Literal["tensorboard", "wandb", "trackio"]
LrSchedulerType = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


class TrainerSettings(Settings):
    """How long and how fast to train, and what is kept of it."""

    learning_rate: float = Field(default=2.5e-6, gt=0, description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="of AdamW")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="of AdamW")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="of AdamW")
    lr_scheduler_type: LrSchedulerType = Field(
        default="constant_with_warmup", description="how the learning rate runs over the steps"
    )
    lr_warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises from 0")
    max_train_steps: int = Field(default=100, ge=1, description="optimizer steps")
    per_device_train_batch_size: int = Field(default=1, ge=1, description="samples per forward and process")
    gradient_accumulation_steps: int = Field(
        default=1,
        ge=1,
        description="forwards per optimizer step, each of which weighs alike, whatever a reward could score of it",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    mixed_precision: Literal["no", "bf16"] = Field(
        default="no",
        description="bf16: frozen weights and arithmetic in bf16, LoRA weights and their optimizer in fp32",
    )
    seed: int = Field(default=0, ge=0, description="of data order, LoRA initialisation and fresh noise")
    max_skipped_steps: int = Field(
        default=10, ge=1, description="stop after N consecutive steps whose loss or gradient is NaN or infinite"
    )
    checkpointing_steps: int = Field(default=50, ge=1, description="write checkpoint-STEP every N steps")
    save_total_limit: int | None = Field(default=None, ge=1, description="keep only the newest so many checkpoints")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="also keep an exponential moving average of the adapter, which validation looks at, and save it as "
        "adapter_ema/",
    )
    stop_when_judge_falls: int | None = Field(
        default=None,
        ge=1,
        description="end the run after so many validations in a row at which a judge of validation.judges falls",
    )
    report_to: tuple[Tracker, ...] = Field(
        default=(), description="trackers beside metrics.jsonl: tensorboard, wandb, trackio, or none"
    )

    @property
    def weight_dtype(self) -> torch.dtype:
        """The floating-point type of the frozen weights."""
        import torch

        return torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_reads_no_as_false(cls, value: Any) -> Any:
        return "no" if value is False else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker_or_none(cls, value: Any) -> Any:
        """`none`, one name, and `a,b` mean the same as lists."""
        if value is None or value == "none":
            return ()
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


class VideoSettings(Settings):
    """Where videos with prompts lie, and what is cut from them."""

    source: Path | None = Field(
        default=None,
        description="metadata.csv, .json or .jsonl with prompt, video and, optionally, reference; a folder of "
        "captioned videos; or a .txt file of prompts",
    )
    num_frames: int = Field(default=17, ge=5, description="frames of every sample; most models take 4k+1")
    height: int | None = Field(
        default=None,
        description="pixels, a multiple of what the model takes (16 or 32); each video keeps its own if not given",
    )
    width: int | None = Field(default=None, description="pixels, as height, and goes with it")
    max_pixels: int = Field(default=480 * 832, description="height times width, where these are not given")
    frame_stride: int = Field(default=1, ge=1, description="use every Nth frame")
    allow_outside: bool = Field(
        default=False,
        description="let metadata name videos and references, and captions link to files, outside the source's folder",
    )

    def check_cut(self, geometry: Geometry) -> None:
        """Raise a ConfigError where a model of this geometry takes no such videos."""
        geometry.check_cut(self.num_frames, self.height, self.width, self.max_pixels, self.frame_stride)

    def shape(self, geometry: Geometry, batch_size: int, sizes: Collection[tuple[int, int]] = ()) -> VideoShape:
        """Return the extents of a batch, the largest where videos keep their proportions.

        Args:
            sizes: heights and widths of the videos before they are cut; without them it is the square of so many
                pixels.
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
        """The dataset that these settings describe.

        Args:
            geometry: the videos that the model takes.
            needs: what model and rewards need of samples.
        Raises:
            ConfigError: it takes no such videos, or there is no source.
            DataError: the source cannot be read, or none of its rows is usable.
        """
        from frostline.train.data.dataset import VideoPromptDataset

        if self.source is None:
            # Without one there is no validation; training needs it.
            raise ConfigError(
                "data.source: is needed: a metadata file, a folder of captioned videos, or prompts (.txt)"
            )
        cut = self.model_dump(include={"num_frames", "height", "width", "max_pixels", "frame_stride", "allow_outside"})
        return VideoPromptDataset(self.source, **cut, geometry=geometry, needs=needs)


class DataSettings(VideoSettings):
    """The training data."""

    num_workers: int = Field(default=0, ge=0, description="processes that decode videos ahead; 0 decodes in between")
    bad_rows: Literal["error", "skip"] = Field(
        default="error", description="rows that cannot be read: refuse to train, or train on the others"
    )


class ValidationSettings(VideoSettings):
    """Held-out starts, generated and scored now and then with noise that never changes."""

    steps: int = Field(default=50, ge=1, description="validate every N steps, and at the start and the end")
    num_videos: int = Field(default=5, ge=1, description="of the source's first rows")
    batch_size: int = Field(default=1, ge=1, description="videos generated together, per process")
    noise_seed: int = Field(default=0, ge=0, description="of the start noise")
    lossless: bool = Field(
        default=False, description="write the clips without loss as well, so that `frostline score` finds the same"
    )
    judges: tuple[SerializeAsAny[RewardEntry], ...] = Field(
        default=(),
        description="rewards that score held-out starts and training never sees, each by its type; their weight, "
        "baseline, scale and cap count for nothing",
    )


class PlanSettings(Settings):
    """Which backend serves which frozen stage."""

    backend: str = Field(
        default="auto",
        description=f"auto (the fastest verified engine), {TORCH}, or a backend: {', '.join(backend_names())}",
    )
    stages: dict[str, str] = Field(default={}, description="backends of single stages, e.g. {vae_encoder: torch}")
    engines: Path = Field(default=Path("engines"), description="the engine store")
    strict: bool = Field(default=False, description="stop where an engine fails, instead of falling back to torch")
    min_shapes: str = Field(default="", description="of the engines, as `frostline export --min-shapes`")
    opt_shapes: str = Field(default="", description="of the engines, as `frostline export --opt-shapes`")
    max_shapes: str = Field(default="", description="of the engines, as `frostline export --max-shapes`")

    def shape_range(self, geometry: Geometry) -> ShapeRange:
        """Return the range of shapes that the engines serve.

        Raises:
            ConfigError: the texts name none.
        """
        return parse_shapes(self.min_shapes, self.opt_shapes, self.max_shapes, geometry)

    def as_plan(self) -> str | dict[str, str]:
        """As a `Runtime` takes it."""
        return {OTHERS: self.backend, **self.stages} if self.stages else self.backend


class MemorySettings(Settings):
    """For which machine `--dry-run` and `fit` plan the memory."""

    fit: Literal["auto", "never"] = Field(
        default="never",
        description="auto: a run that does not fit the devices makes the cheapest changes of its settings that make it "
        "fit, and logs them; those after which it trains something else are warnings",
    )

    num_processes: int = Field(default=1, ge=1, description="processes, one a device")
    sharding: Sharding = Field(default="ddp", description="how accelerate divides weights: ddp, zero2, zero3, fsdp")
    device_gb: float | None = Field(
        default=None, gt=0, description="memory of a device, in 10^9 bytes; that of this machine if not given"
    )


class RunSettings(TrainingModuleSettings, QuantizationSettings):
    """A training run: the step (`num_inference_steps` … `rewards`), and what is around it."""

    model: str = Field(default="tiny", description="tiny, tiny-moe, tiny-ti2v, or the folder of a checkpoint")
    base_adapters: tuple[BaseAdapter, ...] = Field(
        default=(),
        description="adapters that are merged into the denoiser as the model is loaded, each with a path, a scale (1 "
        "if not given) and, of two experts, expert (low or high): the LoRA is trained on top of them",
    )
    init_adapter: Path | None = Field(
        default=None,
        description="LoRA to begin with, a PEFT folder or a .safetensors file, of the rank, scale and layers of lora; "
        "what goes on from a checkpoint does not read it",
    )
    precompute: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="compute what is frozen of all samples before the first step, stage by stage, each alone in "
        "memory: always, never, or auto: if training then does without weights of more than a tenth of the device's "
        "memory, and cache_bytes are enough",
    )
    output_dir: Path = Field(default=Path("runs/train"), description="everything that the run writes")
    overwrite_output_dir: bool = Field(default=False, description="delete the run that output_dir holds")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one")
    data: DataSettings = DataSettings()
    validation: ValidationSettings = ValidationSettings()
    train: TrainerSettings = TrainerSettings()
    plan: PlanSettings = PlanSettings()
    memory: MemorySettings = MemorySettings()

    @model_validator(mode="after")
    def _who_is_to_stop_the_run_is_there(self) -> Self:
        judges = () if self.validation.source is None else self.validation.judges
        if self.train.stop_when_judge_falls is not None and not judges:
            raise ValueError(
                "train.stop_when_judge_falls: nobody judges: name a judge in validation.judges, and held-out starts in "
                "validation.source"
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
        """Return what a step of one process computes on; see `VideoSettings.shape`."""
        return self.data.shape(geometry, self.train.per_device_train_batch_size, sizes)

    @property
    def frozen_cache_dir(self) -> Path:
        """Where the run keeps frozen outputs: on disk, so that every process and a resumed run find them."""
        return self.output_dir / "cache" if self.cache_dir is None else self.cache_dir
