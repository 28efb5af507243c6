"""What a sample gives to a training step: all of it frozen, so computed once and cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frostline.errors import ConfigError, DataError
from frostline.rewards.inputs import RewardInputs
from frostline.runtime.cache import FrozenOutputCache, content_key
from frostline.runtime.identity.computation import computation_id
from frostline.runtime.identity.fingerprint import stage_code
from frostline.stages.conditions import ConditionInputs
from frostline.train.data.batch import check_batch, fit_to_model

# What this file imports is part of what its results are cached by.
if TYPE_CHECKING:
    from frostline.rewards.active import ActiveReward
    from frostline.runtime.runtime import Runtime
    from frostline.stages.video_model import VideoModel


@dataclass(frozen=True)
class Conditioning:
    """The frozen inputs of a step for B samples; what `TrainingModule.forward_preprocess` returns.

    sample_id: names for logs. keys: content keys of the samples' conditions.
    latent_shape: (C, F, h, w) of what is denoised.
    conditions: what the model is conditioned on, by name, tensors of B rows; see `VideoModel.conditions`.
    stages: that the conditions were computed by.
    sample: what rewards are told of the samples.
    references: what each reward keeps of the reference video, tensors of B rows.
    """

    sample_id: tuple[str, ...]
    keys: tuple[str, ...]
    latent_shape: tuple[int, int, int, int]
    conditions: Mapping[str, Tensor]
    stages: tuple[str, ...]
    sample: RewardInputs
    references: tuple[Mapping[str, Tensor], ...]

    @property
    def device(self) -> torch.device:
        """Where the conditions are."""
        return next(iter(self.conditions.values())).device


class Conditioner:
    """Computes conditionings through the runtime, one cached entry per sample and condition."""

    def __init__(
        self,
        model: VideoModel,
        runtime: Runtime,
        rewards: Sequence[ActiveReward],
        cache: FrozenOutputCache | None,
    ) -> None:
        self.model = model
        self.runtime = runtime
        self.rewards = rewards
        self.cache = cache
        self._computations: dict[tuple[str, ...], str] = {}

    @torch.no_grad()
    def __call__(self, data: object) -> Conditioning:
        """Check and fit `data`, then compute or recall all conditions; see `check_batch` for the contract."""
        model = self.model
        batch = check_batch(data)
        video, _ = fit_to_model(batch.video, model.geometry)
        T, H, W = video.shape[1], *video.shape[-2:]
        # Before the video moves: a hash is computed in main memory.
        own_frames = tuple(_reference_frames(frames) for frames in batch.valid_frames)
        own = zip(batch.prompt, video, own_frames, strict=True)
        sample_keys = [content_key(prompt=prompt, video=frames[:count]) for prompt, frames, count in own]
        conditions = model.conditions(ConditionInputs(batch.sample_id, batch.prompt, video[:, 0], T), self.runtime)
        sample = RewardInputs(tuple(batch.prompt), video.to(model.device), own_frames)
        return Conditioning(
            sample_id=batch.sample_id,
            keys=tuple(
                content_key(**{condition.name: condition.keys[row] for condition in conditions})
                for row in range(len(batch.sample_id))
            ),
            latent_shape=(model.latent_channels, *model.geometry.latent_grid(T, H, W)),
            conditions={
                each.name: self.cached_rows(each.name, each.stages, each.keys, each.compute)[each.name]
                for each in conditions
            },
            stages=tuple(dict.fromkeys(stage for each in conditions for stage in each.stages)),
            sample=sample,
            references=tuple(self._references(active, sample, sample_keys) for active in self.rewards),
        )

    def check(self, inputs: object) -> Conditioning:
        """`inputs`, which must be what a conditioner of this model returned.

        Raises:
            DataError: it is something else, or of a model that takes other conditions or has other rewards.
        """
        if not isinstance(inputs, Conditioning):
            raise DataError(f"inputs: must be what forward_preprocess returned, not {type(inputs).__name__}")
        model = self.model
        fits = tuple(inputs.conditions) == model.condition_names and inputs.latent_shape[0] == model.latent_channels
        if not fits or len(inputs.references) != len(self.rewards):
            raise DataError("inputs: are of another model or other rewards: use this module's own forward_preprocess")
        return inputs

    def cached_rows(
        self,
        what: str,
        stages: Sequence[str],
        keys: Sequence[str],
        compute: Callable[[list[int]], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Tensors of a batch, row by row from the cache; the rows that are missing are computed in one call.

        Args:
            what: names the result.
            stages: whose weights and backends it depends on.
            keys: content key of each row.
            compute: from row indices to tensors with one row each.
        """
        if self.cache is None:
            return dict(compute(list(range(len(keys)))))
        depends = [self.runtime.fingerprint(stage) for stage in stages]
        computation = self._computation(compute, stages)
        full = [content_key(what=what, depends=depends, row=key, computation=computation) for key in keys]
        rows = [self.cache.get(key, device=self.model.device) for key in full]
        # The same sample twice in a batch is computed once.
        missing = list({full[i]: i for i, row in enumerate(rows) if row is None}.values())
        if missing:
            computed = compute(missing)
            fresh = {full[i]: {name: t[n].clone() for name, t in computed.items()} for n, i in enumerate(missing)}
            for key, row in fresh.items():
                self.cache.put(key, row)
            rows = [row if row is not None else fresh[key] for row, key in zip(rows, full, strict=True)]
        present = [row for row in rows if row is not None]
        return {name: torch.stack([row[name] for row in present]) for name in present[0]}

    def _computation(self, compute: Callable[..., object], stages: Sequence[str]) -> str:
        """Of `compute` and the stages that it runs."""
        parts = (compute.__module__, *stages)
        if parts not in self._computations:
            of_stages = {name for stage in stages for name in stage_code(self.runtime.stages[stage])}
            self._computations[parts] = computation_id({compute.__module__} | of_stages)
        return self._computations[parts]

    def _references(self, active: ActiveReward, sample: RewardInputs, keys: Sequence[str]) -> Mapping[str, Tensor]:
        """What a reward is to know of each sample, by its own frames."""

        def compute(rows: list[int]) -> Mapping[str, Tensor]:
            # In float32 as `score` is, whatever autocast the step runs in: what is cached must not depend on it.
            with torch.autocast(sample.video.device.type, enabled=False):
                return _by_length(active, sample.rows(rows), self.runtime)

        keys = [content_key(sample=key, settings=active.references_key) for key in keys]
        return self.cached_rows("references", active.stage_names, keys, compute)


def _reference_frames(valid_frames: int) -> int:
    """How many frames of a video a reward refers to: none that pads it, but of a picture the copy behind it.

    Rewards leave out frame 0, which the generated video is given; of a picture, that frame is all there is.
    """
    return max(2, valid_frames)


def _by_length(active: ActiveReward, sample: RewardInputs, runtime: Runtime) -> Mapping[str, Tensor]:
    """A reward's references of samples, of which each counts as far as its number of frames.

    Raises:
        ConfigError: what the reward keeps is of another shape for fewer frames.
    """
    if min(sample.valid_frames) >= sample.video.shape[1]:
        return active.references(sample, runtime)
    rows = [active.references(sample.row(index), runtime) for index in range(len(sample.prompts))]
    try:
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    except RuntimeError as error:
        raise ConfigError(
            f"the reward {active.name} keeps something of each frame, and clips differ in length "
            f"({sorted({*sample.valid_frames})} frames): leave out those that are shorter than num_frames"
        ) from error
