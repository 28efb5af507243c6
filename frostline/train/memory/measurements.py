"""Measure the memory of a model's stages, and share the results among settings that do not affect them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from frostline.config import NOT_QUANTISED, GradientCheckpointing, LoraSettings, QuantizationSettings
from frostline.models.video_shape import VideoShape
from frostline.rewards.reward import Reward
from frostline.stages.families import family_of
from frostline.stages.video_model import VideoModel
from frostline.train.memory.memory_profile import (
    Footprint,
    Weights,
    measure_decoder,
    measure_denoisers,
    measure_frozen_stages,
    measure_rewards,
)

_T = TypeVar("_T")


class Measurements:
    """Measures the memory of a model from the shapes of its weights, without reading the weights.

    Plans of one model with different settings share the results: the decoder does not depend on the LoRA, nor the
    denoiser on the decoded window.

    Args:
        model: see `memory_plan`.
    Raises:
        ConfigError: there is no such model.
    """

    def __init__(self, model: str | Path) -> None:
        self.family = family_of(model)
        self.spec = self.family.read_spec(model)
        self._known: dict[Hashable, Any] = {}

    def model(
        self, dtype: torch.dtype, lora: LoraSettings, quantization: QuantizationSettings = NOT_QUANTISED
    ) -> VideoModel:
        """Return the model with its parameters on the meta device."""
        return self._once(
            ("model", dtype, lora, *_stored(quantization)),
            lambda: self.family.empty_model(self.spec, dtype, lora, quantization),
        )

    def weights(
        self, dtype: torch.dtype, lora: LoraSettings, quantization: QuantizationSettings = NOT_QUANTISED
    ) -> Weights:
        """Return the size of its parameters in bytes."""
        return self._once(
            ("weights", dtype, lora, *_stored(quantization)),
            lambda: Weights.of(self.model(dtype, lora, quantization)),
        )

    def stages(
        self,
        dtype: torch.dtype,
        lora: LoraSettings,
        shape: VideoShape,
        kind: GradientCheckpointing,
        window: int | None = None,
        quantization: QuantizationSettings = NOT_QUANTISED,
    ) -> dict[str, Footprint]:
        """Return the footprint of each stage, by stage name.

        Args:
            window: number of latent frames that a step decodes with gradient; None means all of them.
        """
        model, stored = self.model(dtype, lora, quantization), _stored(quantization)
        frozen = self._once(("frozen", dtype, shape, *stored), lambda: measure_frozen_stages(model, shape))
        denoisers = self._once(
            ("denoisers", dtype, lora, shape, kind, *stored), lambda: measure_denoisers(model, shape, kind)
        )
        decoder = self._once(
            ("decoder", dtype, shape, kind, window), lambda: measure_decoder(model, shape, kind, window)
        )
        return {**frozen, **denoisers, **decoder}

    def rewards(self, rewards: Sequence[Reward], shape: VideoShape) -> dict[str, Footprint]:
        """Return the footprints of the networks of rewards; see `measure_rewards`."""
        # The rewards are stored with the result, so that no other object gets the `id` of one of them.
        key = ("rewards", *map(id, rewards), shape)
        return self._once(key, lambda: (rewards, measure_rewards(rewards, shape)))[1]

    def _once(self, key: Hashable, measure: Callable[[], _T]) -> _T:
        if key not in self._known:
            self._known[key] = measure()
        return cast(_T, self._known[key])


def _stored(quantization: QuantizationSettings) -> tuple[str, str]:
    return quantization.quantization, quantization.text_encoder_quantization
