"""What a sample gives to a training step: all of it frozen, so computed once and cached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frostline.errors import ConfigError, DataError
from frostline.models.wan.text import count_tokens, tokenize
from frostline.models.wan.video_shape import MASK_CHANNELS, latent_grid
from frostline.rewards.inputs import RewardInputs
from frostline.runtime.cache import FrozenOutputCache, content_key
from frostline.runtime.identity.computation import computation_id
from frostline.runtime.identity.fingerprint import stage_code
from frostline.train.data.batch import Batch, check_batch, fit_to_wan

# What this file imports is part of what its results are cached by.
if TYPE_CHECKING:
    from frostline.models.wan.components import WanComponents
    from frostline.rewards.active import ActiveReward
    from frostline.runtime.runtime import Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conditioning:
    """The frozen inputs of a step for B samples; what `WanTrainingModule.forward_preprocess` returns.

    sample_id: names for logs. keys: content keys of the samples' conditions.
    latent_shape: (C, F, H/8, W/8) of what is denoised.
    context: (B, L, text_dim).
    y: (B, 4 + C, F, H/8, W/8) mask and latents of the first frame, if the model takes them.
    clip_feature: (B, 257, 1280), if the model takes it.
    first_frame_latents: (B, C, 1, H/8, W/8), if the model pins them.
    sample: what rewards are told of the samples.
    references: what each reward knows of the reference video, tensors of B rows.
    """

    sample_id: tuple[str, ...]
    keys: tuple[str, ...]
    latent_shape: tuple[int, int, int, int]
    context: Tensor
    y: Tensor | None
    clip_feature: Tensor | None
    first_frame_latents: Tensor | None
    sample: RewardInputs
    references: tuple[Mapping[str, Tensor], ...]

    def denoiser_inputs(self) -> dict[str, Tensor]:
        """What the denoiser takes beside latents and timestep."""
        inputs = {"context": self.context, "y": self.y, "clip_feature": self.clip_feature}
        return {name: tensor for name, tensor in inputs.items() if tensor is not None}


class Conditioner:
    """Computes conditionings through the runtime, one cached entry per sample and condition."""

    def __init__(
        self,
        components: WanComponents,
        runtime: Runtime,
        rewards: Sequence[ActiveReward],
        cache: FrozenOutputCache | None,
    ) -> None:
        self.components = components
        self.runtime = runtime
        self.rewards = rewards
        self.cache = cache
        self._device, self._dtype = components.device, components.dtype
        self._computations: dict[tuple[str, ...], str] = {}
        self._told_of_a_cut_prompt = False

    @torch.no_grad()
    def __call__(self, data: object) -> Conditioning:
        """Check and fit `data`, then compute or recall all conditions; see `check_batch` for the contract."""
        batch = check_batch(data)
        video, _ = fit_to_wan(batch.video, self.components.spatial_multiple)
        T, H, W = video.shape[1], *video.shape[-2:]
        # Before the video moves: a hash is computed in main memory.
        image_keys = [content_key(frame=frame, frames=T) for frame in video[:, 0]]
        own_frames = tuple(_reference_frames(frames) for frames in batch.valid_frames)
        own = zip(batch.prompt, video, own_frames, strict=True)
        sample_keys = [content_key(prompt=prompt, video=frames[:count]) for prompt, frames, count in own]
        video = video.to(self._device)
        sample = RewardInputs(tuple(batch.prompt), video, own_frames)
        first_frame = video[:, 0] * 2 - 1
        ids, mask = tokenize(self.components.tokenizer, list(batch.prompt))
        self._tell_of_cut_prompts(batch, mask)
        text_keys = [content_key(ids=row, mask=used) for row, used in zip(ids, mask, strict=True)]
        return Conditioning(
            sample_id=batch.sample_id,
            keys=tuple(content_key(text=text, image=image) for text, image in zip(text_keys, image_keys, strict=True)),
            latent_shape=(self.components.vae.model.z_dim, *latent_grid(T, H, W, self.components.spatial_stride)),
            context=self._context(ids, mask, text_keys),
            y=self._image_latents(first_frame, T, image_keys),
            clip_feature=self._clip_feature(first_frame, image_keys),
            first_frame_latents=self._first_frame_latents(first_frame, image_keys),
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
        model, given = self.components, (inputs.y, inputs.clip_feature, inputs.first_frame_latents)
        takes = model.takes_image_latents, model.takes_clip_feature, model.pins_first_frame
        fits = takes == tuple(tensor is not None for tensor in given)
        if not fits or inputs.latent_shape[0] != model.vae.model.z_dim or len(inputs.references) != len(self.rewards):
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
        code = self._computation(compute, stages)
        full = [content_key(what=what, depends=depends, row=key, computation=code) for key in keys]
        rows = [self.cache.get(key, device=self._device) for key in full]
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

    def _context(self, ids: Tensor, mask: Tensor, keys: Sequence[str]) -> Tensor:
        def compute(rows: list[int]) -> dict[str, Tensor]:
            return self.runtime["text_encoder"](ids=ids[rows].to(self._device), mask=mask[rows].to(self._device))

        return self.cached_rows("context", ["text_encoder"], keys, compute)["context"]

    def _image_latents(self, first_frame: Tensor, num_frames: int, keys: Sequence[str]) -> Tensor | None:
        """The mask, and the latents of a video that is the first frame and then zeros."""
        if not self.components.takes_image_latents:
            return None

        def compute(rows: list[int]) -> dict[str, Tensor]:
            image = first_frame[rows][:, :, None].to(self._dtype)
            later = image.new_zeros(len(rows), 3, num_frames - 1, *image.shape[-2:])
            latents = self.runtime["vae_encoder"](video=torch.cat([image, later], dim=2))["latents"]
            mask = latents.new_zeros(len(rows), MASK_CHANNELS, *latents.shape[2:])
            mask[:, :, 0] = 1
            return {"y": torch.cat([mask, latents], dim=1)}

        return self.cached_rows("y", ["vae_encoder"], keys, compute)["y"]

    def _first_frame_latents(self, first_frame: Tensor, keys: Sequence[str]) -> Tensor | None:
        if not self.components.pins_first_frame:
            return None

        def compute(rows: list[int]) -> dict[str, Tensor]:
            return self.runtime["vae_encoder"](video=first_frame[rows][:, :, None].to(self._dtype))

        return self.cached_rows("first_frame_latents", ["vae_encoder"], keys, compute)["latents"]

    def _clip_feature(self, first_frame: Tensor, keys: Sequence[str]) -> Tensor | None:
        if not self.components.takes_clip_feature:
            return None

        def compute(rows: list[int]) -> dict[str, Tensor]:
            return self.runtime["image_encoder"](image=first_frame[rows].to(self._dtype))

        return self.cached_rows("clip_feature", ["image_encoder"], keys, compute)["clip_feature"]

    def _references(self, active: ActiveReward, sample: RewardInputs, keys: Sequence[str]) -> Mapping[str, Tensor]:
        """What a reward is to know of each sample, by its own frames."""

        def compute(rows: list[int]) -> Mapping[str, Tensor]:
            # In float32 as `score` is, whatever autocast the step runs in: what is cached must not depend on it.
            with torch.autocast(sample.video.device.type, enabled=False):
                return _by_length(active, sample.rows(rows), self.runtime)

        keys = [content_key(sample=key, settings=active.references_key) for key in keys]
        return self.cached_rows("references", active.stage_names, keys, compute)

    def _tell_of_cut_prompts(self, batch: Batch, mask: Tensor) -> None:
        if self._told_of_a_cut_prompt:
            return
        limit = mask.shape[1]
        for name, prompt, used in zip(batch.sample_id, batch.prompt, mask, strict=True):
            if used.all() and (tokens := count_tokens(self.components.tokenizer, prompt)) > limit:
                self._told_of_a_cut_prompt = True
                cut = f"its prompt has {tokens} tokens, of which the text encoder sees the first {limit}"
                log.warning("sample %s: %s; said once, whatever other prompts are too long", name, cut)
                return


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
