"""Settings, validated: what `WanTrainingModule.from_pretrained` takes and what configuration files hold."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from frostline.errors import ConfigError
from frostline.models.lora import TARGET_MODULES


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Build from plain values.

        Raises:
            ConfigError: names each setting that is unknown (and the nearest known name) or out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_explain(cls, dict(problem)) for problem in error.errors()]
            raise ConfigError("; ".join(problems)) from None


class LoraSettings(Settings):
    """The adapter on the denoiser (the low-noise expert of two)."""

    rank: int = Field(default=32, ge=1, description="inner dimension r of B A")
    alpha: float | None = Field(default=None, gt=0, description="the scale is alpha / rank; alpha = rank if not given")
    target_modules: tuple[str, ...] = Field(
        default=TARGET_MODULES, min_length=1, description="names of the adapted layers"
    )


class RewardSettings(Settings):
    """The face-identity reward: `-(face_score - baseline) / scale * weight` joins the loss."""

    baseline: float = Field(default=0.54, description="score at which the reward is zero")
    scale: float = Field(default=0.16, gt=0, description="spread of scores that counts as one unit")
    weight: float = Field(default=0.1, ge=0, description="weight of the reward in the loss")
    detector: str = Field(default="mtcnn", description="mtcnn, yunet or scrfd:PATH.onnx")
    embedder: str = Field(default="sface", description="sface, facenet[:TAG or PATH] or arcface:PATH.onnx")
    upscale: int = Field(default=1, ge=1, le=8, description="enlarge frames this many times before detection")
    min_face_size: int = Field(
        default=20, ge=12, description="smallest face that mtcnn looks for, in (enlarged) pixels"
    )
    missing_face: Literal["exclude", "zero"] = Field(
        default="exclude", description="frames without a face: left out of the mean, or counted as 0"
    )
    on_no_face: Literal["skip", "zero", "error"] = Field(
        default="skip", description="samples without any face: no reward, a score of 0, or an error"
    )


class TrainingModuleSettings(Settings):
    """One training step; the defaults are those of the reference (IPRO, arXiv 2510.14255)."""

    num_inference_steps: int = Field(default=8, ge=1, description="N, Euler steps from noise to video")
    mid_timestep: int = Field(default=4, ge=0, description="first step with gradient")
    final_timestep: int = Field(default=7, ge=0, description="last step with gradient")
    shift: float = Field(default=5.0, gt=0, description="s of the sigma schedule")
    boundary: float | None = Field(default=None, ge=0, le=1, description="of two experts; the model's own if not given")
    noise_seed: int | None = Field(default=24, description="seed of the start noise; null draws fresh noise every step")
    kl_weight: float = Field(default=1.0, ge=0, description="weight of the KL term in the loss")
    gradient_checkpointing: Literal["none", "block", "full"] = Field(
        default="none", description="recompute nothing, every block, or the whole denoiser and VAE decode in backward"
    )
    lora: LoraSettings = LoraSettings()
    reward: RewardSettings = RewardSettings()
    cache_dir: Path | None = Field(default=None, description="where frozen outputs are kept; memory if not given")
    cache_bytes: int = Field(default=8 * 2**30, ge=0, description="bound of the frozen-output cache; 0 switches it off")

    @model_validator(mode="after")
    def _steps_are_ordered(self) -> Self:
        if not self.mid_timestep <= self.final_timestep < self.num_inference_steps:
            raise ValueError(
                f"mid_timestep <= final_timestep < num_inference_steps must hold, not {self.mid_timestep}, "
                f"{self.final_timestep}, {self.num_inference_steps}"
            )
        return self


def _explain(settings: type[BaseModel], problem: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where or 'settings'}: {problem['msg'].removeprefix('Value error, ')}"
    *parents, key = problem["loc"]
    for parent in parents:
        annotation = settings.model_fields[parent].annotation
        # `LoraSettings | None` is a union of which one part is the settings.
        settings = next(part for part in (*get_args(annotation), annotation) if isinstance(part, type))
    close = difflib.get_close_matches(str(key), settings.model_fields, n=1, cutoff=0.5)
    known = f"is {close[0]} meant?" if close else f"known are {', '.join(settings.model_fields)}"
    return f"{where}: unknown setting, {known}"
