"""The settings of `frostline sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from frostline.config import BaseAdapter, Precision, QuantizationSettings
from frostline.errors import ConfigError
from frostline.experts import Experts
from frostline.stages.families import family_of

# A default that `SampleSettings` replaces by a number before validation.
_AS_TRAINED: Any = None
_OF_THE_VIDEO = ("num_frames", "height", "width", "max_pixels")
# Default for a model that was trained with several or unknown sizes.
_NUM_FRAMES, _MAX_PIXELS = 81, 480 * 832


class SampleSettings(QuantizationSettings):
    """Settings of `frostline sample`."""

    model: str = Field(description="video model: tiny, tiny-moe, tiny-ti2v, or a checkpoint folder")
    prompt: str = Field(min_length=1, description="text prompt")
    image: Path | None = Field(default=None, description="first frame: a picture, or a video whose first frame is used")
    adapter: Path | None = Field(
        default=None,
        description="LoRA adapter: a PEFT folder, a .safetensors file, or for two experts a folder with "
        "high_noise and low_noise; without it, the base model is sampled",
    )
    expert: Experts | None = Field(
        default=None,
        description="expert that the adapter is for, in a model with two: low, high, or both; by default "
        "both if the folder contains both, otherwise low",
    )
    lora_scale: float = Field(default=1.0, description="scale of the adapter; 1 is the scale it was trained with")
    base_adapters: tuple[BaseAdapter, ...] = Field(
        default=(), description="adapters to merge into the denoiser when the model is loaded, as in training"
    )
    seed: int = Field(default=0, ge=0, description="seed of the start noise")
    num_inference_steps: int = Field(default=8, ge=1, description="Euler steps from noise to video")
    shift: float = Field(default=5.0, gt=0, description="shift of the sigma schedule")
    num_frames: int = Field(
        default=_AS_TRAINED,
        ge=1,
        description="number of frames (4k + 1 for most models); by default as the model was trained, otherwise 81",
    )
    height: int | None = Field(
        default=None,
        description="height in pixels, set together with the width; by default as the model was trained, "
        "otherwise that of the picture",
    )
    width: int | None = Field(
        default=None, description="width in pixels, set together with the height; defaults like the height"
    )
    max_pixels: int = Field(
        default=_AS_TRAINED,
        ge=256,
        description="area in pixels to which larger pictures are reduced, instead of height and width; by "
        "default 399360, equal to 480 by 832",
    )
    fps: float = Field(default=16, gt=0, description="frames per second of the output")
    plan: str = Field(
        default="auto",
        description="backend of each stage: auto, torch, a backend for all, or stage=backend,stage=backend",
    )
    engines: Path | None = Field(default=Path("engines"), description="engine store")
    strict: bool = Field(default=False, description="fail when an engine fails, instead of falling back to torch")
    precision: Precision = Field(default="fp32", description="floating-point type of the weights")
    offload_blocks: int = Field(
        default=0,
        ge=0,
        description="number of blocks of each denoiser, evenly spaced, whose weights are offloaded to main memory and "
        "copied to the GPU while the preceding block computes: same result, slower",
    )
    device: str = Field(default="auto", description="device: cpu, cuda, or auto (a GPU if available)")

    @model_validator(mode="before")
    @classmethod
    def _as_trained(cls, values: Any) -> Any:
        """Set missing values to those the model was trained with."""
        if not isinstance(values, dict) or not isinstance(values.get("model"), str):
            return values
        given = {name: value for name, value in values.items() if value is not None or name not in _OF_THE_VIDEO}
        trained = family_of(values["model"]).trained_video(values["model"])
        defaults: dict[str, int] = {"num_frames": _NUM_FRAMES, "max_pixels": _MAX_PIXELS}
        if trained is not None:
            defaults["num_frames"], height, width = trained
            if not given.keys() & {"height", "width", "max_pixels"}:
                defaults |= {"height": height, "width": width}
        return {**defaults, **given}

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        try:
            family_of(self.model).GEOMETRY.check_frames(self.num_frames)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width must be set together")
        if self.expert is not None and self.adapter is None:
            raise ValueError("expert: requires an adapter")
        if self.image is None and self.height is None:
            raise ValueError("without an image, height and width are needed")
        return self
