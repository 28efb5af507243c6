"""Conditions of a Wan denoiser: the text context, and the inputs that depend on the first frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frostline.models.wan.text import count_tokens, tokenize
from frostline.models.wan.video_shape import MASK_CHANNELS
from frostline.runtime.cache import content_key
from frostline.stages.conditions import Condition

# The imports of this file are part of the cache key of its results.
if TYPE_CHECKING:
    from frostline.models.wan.components import WanComponents
    from frostline.stages.conditions import ConditionInputs
    from frostline.stages.provider import Stages

CONTEXT, IMAGE_LATENTS, FIRST_FRAME, CLIP = "context", "y", "first_frame_latents", "clip_feature"
CLIP_LATENTS = "clip_latents"


def condition_names(components: WanComponents) -> tuple[str, ...]:
    """Return the names of the model's conditions: `context`, and some of `y`, `first_frame_latents` and `clip_feature`.

    context: (B, L, text_dim).
    y: (B, 4 + C, F, h, w), mask and latents of the first frame.
    first_frame_latents: (B, C, 1, h, w), which stay fixed during sampling.
    clip_feature: (B, 257, 1280).
    """
    taken = {
        IMAGE_LATENTS: components.takes_image_latents,
        FIRST_FRAME: components.pins_first_frame,
        CLIP: components.takes_clip_feature,
    }
    return (CONTEXT, *(name for name, takes in taken.items() if takes))


def conditions(components: WanComponents, inputs: ConditionInputs, run: Stages) -> list[Condition]:
    """Return the conditions of a batch; each is computed for the requested rows only."""
    device, dtype = components.device, components.dtype
    ids, mask = tokenize(components.tokenizer, inputs.prompts)
    image_keys = tuple(content_key(frame=frame, frames=inputs.num_frames) for frame in inputs.first_frame)
    first_frame = inputs.first_frame.to(device) * 2 - 1

    def context(rows: list[int]) -> dict[str, Tensor]:
        return run["text_encoder"](ids=ids[rows].to(device), mask=mask[rows].to(device))

    def image_latents(rows: list[int]) -> dict[str, Tensor]:
        """Return the mask, and the latents of a video of the first frame followed by zeros."""
        image = first_frame[rows][:, :, None].to(dtype)
        later = image.new_zeros(len(rows), 3, inputs.num_frames - 1, *image.shape[-2:])
        latents = run["vae_encoder"](video=torch.cat([image, later], dim=2))["latents"]
        given = latents.new_zeros(len(rows), MASK_CHANNELS, *latents.shape[2:])
        given[:, :, 0] = 1
        return {IMAGE_LATENTS: torch.cat([given, latents], dim=1)}

    def first_frame_latents(rows: list[int]) -> dict[str, Tensor]:
        return {FIRST_FRAME: run["vae_encoder"](video=first_frame[rows][:, :, None].to(dtype))["latents"]}

    def clip_feature(rows: list[int]) -> dict[str, Tensor]:
        return run["image_encoder"](image=first_frame[rows].to(dtype))

    text_keys = tuple(content_key(ids=row, mask=used) for row, used in zip(ids, mask, strict=True))
    made = {
        CONTEXT: Condition(CONTEXT, ("text_encoder",), text_keys, context),
        IMAGE_LATENTS: Condition(IMAGE_LATENTS, ("vae_encoder",), image_keys, image_latents),
        FIRST_FRAME: Condition(FIRST_FRAME, ("vae_encoder",), image_keys, first_frame_latents),
        CLIP: Condition(CLIP, ("image_encoder",), image_keys, clip_feature),
    }
    return [made[name] for name in condition_names(components)]


def clip_latents(components: WanComponents, video: Tensor, run: Stages) -> Condition:
    """Return the latents (B, C, F, h, w) of clips (B, T, 3, H, W) in [0, 1]."""

    def encode(rows: list[int]) -> dict[str, Tensor]:
        pixels = video[rows].to(components.device).transpose(1, 2) * 2 - 1
        return {CLIP_LATENTS: run["vae_encoder"](video=pixels.to(components.dtype))["latents"]}

    return Condition(CLIP_LATENTS, ("vae_encoder",), tuple(content_key(clip=clip) for clip in video), encode)


def cut_prompt(components: WanComponents, inputs: ConditionInputs) -> str | None:
    """Return a warning about the first prompt that is too long for the text encoder, or None."""
    _, mask = tokenize(components.tokenizer, inputs.prompts)
    limit = mask.shape[1]
    for name, prompt, used in zip(inputs.sample_id, inputs.prompts, mask, strict=True):
        if used.all() and (tokens := count_tokens(components.tokenizer, prompt)) > limit:
            return f"sample {name}: its prompt has {tokens} tokens, the text encoder uses the first {limit}"
    return None
