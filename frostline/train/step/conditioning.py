"""The frozen inputs of a training step, computed once for each sample and cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frostline.errors import ConfigError, DataError
from frostline.rewards.inputs import KEEPS, RewardInputs
from frostline.runtime.cache import FrozenOutputCache, content_key
from frostline.runtime.identity.computation import computation_id
from frostline.runtime.identity.fingerprint import stage_code
from frostline.stages.conditions import Condition, ConditionInputs
from frostline.train.data.batch import Batch, check_batch, fit_to_model
from frostline.train.data.needs import SampleNeeds

# The imports of this file are part of the cache key of its results.
if TYPE_CHECKING:
    from frostline.rewards.active import ActiveReward
    from frostline.runtime.runtime import Runtime
    from frostline.stages.video_model import VideoModel


@dataclass(frozen=True)
class Conditioning:
    """The frozen inputs of a step for B samples; the return value of `TrainingModule.forward_preprocess`.

    Attributes:
        sample_id: names for logs.
        keys: content keys of the samples' conditions.
        sample_keys: content keys of the inputs of rewards.
        latent_shape: (C, F, h, w) of the denoised latents.
        conditions: conditions of the model by name, tensors of B rows; see `VideoModel.conditions`.
        stages: stages that computed the conditions.
        sample: the inputs of rewards.
        clip_latents: latents of the samples' own clips, (B, C, F, h, w), and whether each latent frame is not padding,
            (B, F) bool; None if no loss uses them.
        references: data that each reward keeps of the reference, tensors of B rows; empty for a reward that uses
            neither reference nor prompt.
    """

    sample_id: tuple[str, ...]
    keys: tuple[str, ...]
    sample_keys: tuple[str, ...]
    latent_shape: tuple[int, int, int, int]
    conditions: Mapping[str, Tensor]
    stages: tuple[str, ...]
    sample: RewardInputs
    references: tuple[Mapping[str, Tensor], ...]
    clip_latents: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Return the device of the conditions."""
        return next(iter(self.conditions.values())).device

    def repeated(self, times: int) -> Conditioning:
        """Return the inputs of rewards for several clips per sample: all samples, then all again."""
        if times == 1:
            return self
        sample = self.sample.rows([*range(len(self.sample_id))] * times)
        references = tuple(
            {name: torch.cat([tensor] * times) for name, tensor in kept.items()} for kept in self.references
        )
        return replace(self, sample_id=self.sample_id * times, sample=sample, references=references)


@dataclass(frozen=True)
class FittedBatch:
    """B samples, checked and resized for the model, before any stage is run.

    Attributes:
        video: (B, T, 3, H, W) in [0, 1], on the device of the given video, with a size that the model supports.
        sample_keys: content keys of the inputs of rewards.
        sample: the inputs of rewards, on the model's device.
    """

    batch: Batch
    video: Tensor
    sample_keys: tuple[str, ...]
    sample: RewardInputs

    def latent_shape(self, model: VideoModel) -> tuple[int, int, int, int]:
        """Return (C, F, h, w) of the denoised latents."""
        return (model.latent_channels, *model.geometry.latent_grid(self.video.shape[1], *self.video.shape[-2:]))


class Conditioner:
    """Computes conditionings through the runtime, with one cache entry per sample and condition."""

    def __init__(
        self,
        model: VideoModel,
        runtime: Runtime,
        rewards: Sequence[ActiveReward],
        cache: FrozenOutputCache | None,
        with_clips: bool = False,
    ) -> None:
        self.model = model
        self.runtime = runtime
        self.rewards = rewards
        self.cache = cache
        self.with_clips = with_clips
        entries = [active.config for active in rewards]
        self.needs = SampleNeeds.of(model.name, model.needs_image, entries, trains_on_clips=with_clips)
        self._computations: dict[tuple[str, ...], str] = {}

    @torch.no_grad()
    def __call__(self, data: object) -> Conditioning:
        """Check and resize `data`, then compute all conditions or read them from the cache; see `check_batch` for the
        format.

        Raises:
            DataError: `data` is invalid, or a sample without a video needs one.
        """
        fitted = self.fit(data)
        conditions = self.conditions(fitted)
        return self.conditioning(
            fitted,
            conditions,
            references=self.references(fitted.sample, fitted.sample_keys),
            clip_latents=self._clip_latents(fitted) if self.with_clips else None,
        )

    def fit(self, data: object) -> FittedBatch:
        """Check a batch and resize it for the model; raises like `__call__`."""
        model = self.model
        batch = check_batch(data)
        self._check_videos(batch)
        video, _ = fit_to_model(batch.video, model.geometry)
        # Before the video is moved: hashes are computed in main memory.
        own_frames = tuple(_reference_frames(frames) for frames in batch.valid_frames)
        own = zip(batch.prompt, video, own_frames, batch.reference, strict=True)
        sample_keys = [
            content_key(prompt=prompt, video=frames[:count], reference=pictures)
            for prompt, frames, count, pictures in own
        ]
        pictures = tuple(None if of_one is None else of_one.to(model.device) for of_one in batch.reference)
        sample = RewardInputs(batch.prompt, video.to(model.device), own_frames, pictures, batch.fps)
        return FittedBatch(batch, video, tuple(sample_keys), sample)

    def conditions(self, fitted: FittedBatch) -> Sequence[Condition]:
        """Return the model's conditions of a batch, not yet computed."""
        batch, video = fitted.batch, fitted.video
        inputs = ConditionInputs(batch.sample_id, batch.prompt, video[:, 0], video.shape[1])
        return self.model.conditions(inputs, self.runtime)

    def conditioning(
        self,
        fitted: FittedBatch,
        conditions: Sequence[Condition],
        references: tuple[Mapping[str, Tensor], ...] = (),
        clip_latents: tuple[Tensor, Tensor] | None = None,
    ) -> Conditioning:
        """Compute the conditions of a batch, or read them from the cache."""
        return Conditioning(
            sample_id=fitted.batch.sample_id,
            keys=row_keys(conditions),
            sample_keys=fitted.sample_keys,
            latent_shape=fitted.latent_shape(self.model),
            conditions={each.name: self.cached(each)[each.name] for each in conditions},
            stages=stages_of(conditions),
            sample=fitted.sample,
            references=references,
            clip_latents=clip_latents,
        )

    def cached(self, condition: Condition) -> dict[str, Tensor]:
        """Compute a frozen result, or read it from the cache; return tensors of B rows."""
        return self.cached_rows(condition.name, condition.stages, condition.keys, condition.compute)

    def references(self, sample: RewardInputs, sample_keys: Sequence[str]) -> tuple[Mapping[str, Tensor], ...]:
        """Compute the references of each reward for samples, or read them from the cache.

        Args:
            sample_keys: content keys of the samples.
        """
        frozen = (self.reference_of(active, sample, sample_keys) for active in self.rewards)
        return tuple({} if each is None else self.cached(each) for each in frozen)

    def check(self, inputs: object) -> Conditioning:
        """Return `inputs` if a conditioner of this model created it.

        Raises:
            DataError: it is something else, or belongs to a model with other conditions or rewards.
        """
        if not isinstance(inputs, Conditioning):
            raise DataError(f"inputs: must be the return value of forward_preprocess, not {type(inputs).__name__}")
        model = self.model
        fits = tuple(inputs.conditions) == model.condition_names and inputs.latent_shape[0] == model.latent_channels
        if not fits or len(inputs.references) != len(self.rewards):
            raise DataError(
                "inputs: belong to another model or to other rewards: use this module's own forward_preprocess"
            )
        return inputs

    def cached_rows(
        self,
        what: str,
        stages: Sequence[str],
        keys: Sequence[str],
        compute: Callable[[list[int]], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return tensors of a batch, row by row from the cache; missing rows are computed in one call.

        Args:
            what: name of the result.
            stages: stages whose weights and backends it depends on.
            keys: content key of each row.
            compute: maps row indices to tensors with one row each.
        """
        if self.cache is None:
            return dict(compute(list(range(len(keys)))))
        full = self.entry_keys(what, stages, keys, compute.__module__)
        rows = [self.cache.get(key, device=self.model.device) for key in full]
        # A sample that occurs twice in a batch is computed once.
        missing = list({full[i]: i for i, row in enumerate(rows) if row is None}.values())
        if missing:
            computed = compute(missing)
            fresh = {full[i]: {name: t[n].clone() for name, t in computed.items()} for n, i in enumerate(missing)}
            self.cache.put_batch(fresh)
            rows = [row if row is not None else fresh[key] for row, key in zip(rows, full, strict=True)]
        present = [row for row in rows if row is not None]
        return {name: torch.stack([row[name] for row in present]) for name in present[0]}

    def entry_keys(self, what: str, stages: Sequence[str], keys: Sequence[str], code: str) -> list[str]:
        """Return the cache keys that `cached_rows` uses.

        Args:
            what, stages, keys: see `cached_rows`.
            code: the module of the function that computes it.
        """
        depends = [self.runtime.fingerprint(stage) for stage in stages]
        computation = self._computation(code, stages)
        return [content_key(what=what, depends=depends, row=key, computation=computation) for key in keys]

    def _clip_latents(self, fitted: FittedBatch) -> tuple[Tensor, Tensor]:
        each = self.model.clip_latents(fitted.video, self.runtime)
        latents = self.cached(each)[each.name]
        # A latent frame counts if all frames that it represents count.
        whole = [1 + (frames - 1) // self.model.geometry.temporal_stride for frames in fitted.batch.valid_frames]
        counted = torch.arange(latents.shape[2]) < torch.tensor(whole)[:, None]
        return latents, counted.to(latents.device)

    def _computation(self, code: str, stages: Sequence[str]) -> str:
        """Return the computation id of a module and the stages that it runs."""
        parts = (code, *stages)
        if parts not in self._computations:
            of_stages = {name for stage in stages for name in stage_code(self.runtime.stages[stage])}
            self._computations[parts] = computation_id({code} | of_stages)
        return self._computations[parts]

    def _check_videos(self, batch: Batch) -> None:
        for name, frames, pictures in zip(batch.sample_id, batch.valid_frames, batch.reference, strict=True):
            if frames == 0 and (reason := self.needs.refuses_without_video(pictures is not None)):
                raise DataError(f"sample {name}, field 'video': there is none (valid_frames is 0), but {reason}")

    def reference_of(self, active: ActiveReward, sample: RewardInputs, keys: Sequence[str]) -> Condition | None:
        """Return the references of a reward for each sample, from its frames and pictures, not yet computed; None if it
        uses none.

        Args:
            keys: content keys of the samples.
        """
        if not active.config.needs & KEEPS:
            return None

        def compute(rows: list[int]) -> dict[str, Tensor]:
            # In float32, like `score`: cached values must not depend on the autocast of the step.
            with torch.autocast(sample.video.device.type, enabled=False):
                return dict(_by_length(active, sample.rows(rows), self.runtime))

        keys = [content_key(sample=key, settings=active.references_key) for key in keys]
        return Condition("references", active.stage_names, tuple(keys), compute)


def row_keys(conditions: Sequence[Condition]) -> tuple[str, ...]:
    """Return the content key of all conditions of each sample."""
    rows = range(len(conditions[0].keys))
    return tuple(content_key(**{each.name: each.keys[row] for each in conditions}) for row in rows)


def stages_of(conditions: Sequence[Condition]) -> tuple[str, ...]:
    """Return the stages that compute the conditions, without duplicates."""
    return tuple(dict.fromkeys(stage for each in conditions for stage in each.stages))


def _reference_frames(valid_frames: int) -> int:
    """Return how many frames of a video rewards use: all frames without padding; for a picture, the frame and one copy.

    Rewards skip frame 0, which is given to the generated video; a picture has only that frame.
    """
    return max(2, valid_frames) if valid_frames else 0


def _by_length(active: ActiveReward, sample: RewardInputs, runtime: Runtime) -> Mapping[str, Tensor]:
    """Compute a reward's references for samples with different numbers of valid frames, or with pictures.

    Raises:
        ConfigError: the shape of a reference depends on the number of frames.
    """
    whole = min(sample.valid_frames) >= sample.video.shape[1]
    if whole and all(pictures is None for pictures in sample.reference):
        return active.references(sample, runtime)
    rows = [active.references(sample.row(index), runtime) for index in range(len(sample.prompts))]
    try:
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    except RuntimeError as error:
        raise ConfigError(
            f"the reward {active.name} stores data of each frame, but clips have different lengths "
            f"({sorted({*sample.valid_frames})} frames) or their own references: remove clips that "
            "are shorter than num_frames, and the column reference"
        ) from error
