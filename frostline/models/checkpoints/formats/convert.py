"""Convert the tensors of a network from diffusers' format to Wan's, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from frostline.errors import ConfigError

from .names import DENOISER, IMAGE_ENCODER, TEXT_ENCODER, Pairs, Part, rename, vae_pairs

Tensors = Mapping[str, Tensor]

# diffusers stores the embedding of UMT5 as `shared.weight`, under this name, or under both.
_TIED = "encoder.embed_tokens.weight"
_VISION = "vision_model."
# Tensors that `IMAGE_ENCODER` cannot convert, because their shapes differ.
_CLASS = ("visual.cls_embedding", "vision_model.embeddings.class_embedding")
_POSITION = ("visual.pos_embedding", "vision_model.embeddings.position_embedding.weight")
_PROJECTION = ("visual.head", "visual_projection.weight")
_LOG_SCALE = "log_scale"


def to_official(part: Part, tensors: Tensors) -> dict[str, Tensor]:
    """Convert tensors from diffusers' names to Wan's names.

    Raises:
        ConfigError: a name does not exist in diffusers, or the image encoder has no class or position embedding.
    """
    if part == "image_encoder":
        return _image_encoder_to_official(tensors)
    if part == "text_encoder":
        tensors = {"shared.weight" if name == _TIED else name: tensor for name, tensor in tensors.items()}
    return _renamed(part, tensors, to_diffusers=False)


def to_diffusers(part: Part, tensors: Tensors) -> dict[str, Tensor]:
    """Convert tensors from Wan's names to diffusers' names.

    Raises:
        ConfigError: a name does not exist in Wan.
    """
    if part == "image_encoder":
        return _image_encoder_to_diffusers(tensors)
    return _renamed(part, tensors, to_diffusers=True)


def _renamed(part: Part, tensors: Tensors, *, to_diffusers: bool) -> dict[str, Tensor]:
    pairs = _pairs(part, tensors)
    names = rename(tensors, pairs, to_diffusers=to_diffusers)
    unknown = [name for name in tensors if name not in names]
    if unknown:
        raise ConfigError(
            f"{len(unknown)} tensors do not belong to a Wan {part.replace('_', ' ')}, the first is {unknown[0]}"
        )
    return {names[name]: tensor for name, tensor in tensors.items()}


def _pairs(part: Part, names: Iterable[str]) -> Pairs:
    if part == "vae":
        return _vae_pairs(list(names))
    return {"denoiser": DENOISER, "text_encoder": TEXT_ENCODER, "image_encoder": IMAGE_ENCODER}[part]


def _vae_pairs(names: list[str]) -> Pairs:
    """Return the table of names for a VAE; the numbers of its blocks are inferred from `names`, in either format.

    Each resolution has the same number of residual blocks, and there is a resampling block between resolutions.
    """
    nested = any(re.match(r"encoder\.down(samples\.\d+\.downsamples|_blocks\.\d+\.resnets)\.", name) for name in names)
    inside = r"\.\d+\.(?:downsamples\.\d+|resnets\.\d+|downsampler)" if nested else r"\.\d+"
    block = re.compile(rf"(encoder\.down(?:samples|_blocks){inside})\.(residual\.0\.|norm1\.|resample\.1\.weight)")
    found = [match.groups() for name in names if (match := block.match(name))]
    resamples = sum(kind.startswith("resample") for _, kind in found)
    levels = resamples + 1
    return vae_pairs(levels, (len(found) - resamples) // levels, nested)


def _image_encoder_to_official(tensors: Tensors) -> dict[str, Tensor]:
    """Convert CLIP to Wan's format: one matrix for q, k and v, and embeddings with a batch dimension."""
    spelled = {name if name.startswith((_VISION, "visual_")) else _VISION + name: t for name, t in tensors.items()}
    apart = {"q": {}, "k": {}, "v": {}}
    rest = {}
    for name, tensor in spelled.items():
        match = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if match:
            layer, kind, leaf = match.groups()
            apart[kind][f"visual.transformer.{layer}.attn.to_qkv.{leaf}"] = tensor
        else:
            rest[name] = tensor
    special = {ours: rest.pop(theirs) for ours, theirs in (_CLASS, _POSITION, _PROJECTION) if theirs in rest}
    rest.pop("vision_model.embeddings.position_ids", None)
    official = _renamed("image_encoder", rest, to_diffusers=False)
    official.update({name: torch.cat([apart[kind][name] for kind in "qkv"]) for name in apart["q"]})
    if _CLASS[0] not in special or _POSITION[0] not in special:
        raise ConfigError("the image encoder has no class or position embedding")
    official[_CLASS[0]] = special[_CLASS[0]][None, None]
    official[_POSITION[0]] = special[_POSITION[0]][None]
    # Wan uses the output of the second-to-last block, so the projection and `log_scale` have no effect; diffusers omits
    # both.
    width = official[_CLASS[0]].shape[-1]
    head = special.get(_PROJECTION[0])
    blank = official[_CLASS[0]].new_zeros
    official[_PROJECTION[0]] = blank(width, _CLIP_EMBEDDING) if head is None else head.T.contiguous()
    official[_LOG_SCALE] = blank(())
    return official


# Width of the joint embedding of text and image in Wan's CLIP model.
_CLIP_EMBEDDING = 1024


def _image_encoder_to_diffusers(tensors: Tensors) -> dict[str, Tensor]:
    """Convert to `CLIPVisionModel`, which has no projection; omit `visual.head`, `log_scale` and the text tower."""
    left_out = (_PROJECTION[0], _LOG_SCALE)
    visual = {n: t for n, t in tensors.items() if n not in left_out and not n.startswith("textual.")}
    special = {_CLASS[1]: visual.pop(_CLASS[0])[0, 0], _POSITION[1]: visual.pop(_POSITION[0])[0]}
    for name in [name for name in visual if ".attn.to_qkv." in name]:
        _, _, layer, _, _, leaf = name.split(".")
        for kind, matrix in zip("qkv", visual.pop(name).chunk(3), strict=True):
            special[f"vision_model.encoder.layers.{layer}.self_attn.{kind}_proj.{leaf}"] = matrix.contiguous()
    return _renamed("image_encoder", visual, to_diffusers=True) | special
