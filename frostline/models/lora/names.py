"""Map tensor names in adapter files of several programs to paths in Wan's denoiser.

Sources: `PeftModel.save_pretrained`; `GeneralLoRALoader` of diffsynth; `comfy/lora.py` and
`comfy/weight_adapter/lora.py` of ComfyUI; `WanLoraLoaderMixin` of diffusers; `networks/lora.py` of musubi-tuner;
`utils/lora_utils.py` of VideoX-Fun.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

from frostline.models.checkpoints.formats.names import DENOISER, rename


class LayerPath(Protocol):
    """Returns the path of a module or bare parameter in a family's denoiser for its name in a file; None if there is
    none.

    Args:
        flat: whether the name has underscores instead of dots.
    """

    def __call__(self, name: str, *, flat: bool = False) -> str | None: ...


class DiffusersPath(Protocol):
    """Returns the diffusers path of a module of a family's denoiser; None if diffusers does not have it."""

    def __call__(self, layer: str) -> str | None: ...


Kind = Literal["down", "up", "up_bias", "alpha", "weight_difference", "bias_difference", "modulation_difference"]

# Prefixes of layer paths in files. In diffusers, a pipeline with two experts has `transformer_2`.
_WRAPPERS = re.compile(
    r"(?:(?:base_model\.model|model|diffusion_model|transformer|transformer_2|pipe|dit|dit2|unet)\.)*"
)
# kohya's programs write paths with underscores instead of dots; resolving them requires the layer names of the network.
_FLAT = re.compile(r"(lora_(?:unet|transformer)_+)(.+)")
_TEXT_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:text_encoders?(?:_\d)?|te\d?|cond_stage_model|conditioner)\..+|lora_te\d?_.+"
)
# Suffixes after the path of the layer. PEFT appends the name of the adapter to that of the matrix.
_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight", "down"),
    (r"(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight", "up"),
    (r"(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.bias", "up_bias"),
    ("alpha", "alpha"),
    ("diff", "weight_difference"),
    ("diff_b", "bias_difference"),
    ("diff_m", "modulation_difference"),
)
_TENSORS: tuple[tuple[re.Pattern[str], Kind], ...] = tuple((re.compile(rf"(.+?)\.{end}"), kind) for end, kind in _KINDS)
# Names that identify adapters other than a LoRA with two matrices per layer.
_OTHER_WAYS = (
    (re.compile(r".*\.(dora_scale|lora_magnitude_vector.*)"), "DoRA"),
    (re.compile(r".*\.(hada_\w+)"), "LoHa"),
    (re.compile(r".*\.(lokr_\w+)"), "LoKr"),
    (re.compile(r".*\.(oft_\w+)(\..+)?"), "OFT"),
    (re.compile(r".*\.lora_mid(\..+)?"), "a LoRA with a third matrix (Tucker decomposition)"),
    (re.compile(r".*\.(reshape_weight|set_weight)"), "weights of another shape"),
)
# Parameters that do not belong to a submodule.
_BARE = re.compile(r".*\.(modulation|emb_pos)")
# Layers whose weight is not a matrix, which a LoRA cannot change.
_NO_MATRIX = re.compile(r".*\.(norm\w*|modulation|emb_pos)|img_emb\.proj\.[04]")


@dataclass(frozen=True)
class TensorName:
    """The parsed name of a tensor.

    Attributes:
        prefix: prefix before the layer.
        plain: the layer as written in the file.
        kind: role of the tensor in the layer.
        layer: the module path in `WanModel`, or the name of the parameter for a difference; None if there is no such
            layer.
    """

    prefix: str
    plain: str
    kind: Kind
    layer: str | None


def is_of_text_encoder(name: str) -> bool:
    """Return whether a tensor belongs to a text encoder, which some programs adapt together with the denoiser."""
    return _TEXT_ENCODER.fullmatch(name) is not None


def other_way(name: str) -> str | None:
    """Return the kind of adapter, other than LoRA, that uses this tensor name; None if unknown."""
    return next((way for pattern, way in _OTHER_WAYS if pattern.fullmatch(name)), None)


def parse_name(name: str, layer_path: LayerPath) -> TensorName | None:
    """Parse the name of a tensor; return None if it is not a LoRA tensor."""
    for pattern, kind in _TENSORS:
        if match := pattern.fullmatch(name):
            prefix, plain, flat = _without_prefix(match[1])
            return TensorName(prefix, plain, kind, _official(plain, kind, flat, layer_path))
    return None


def denoiser_path(name: str, *, flat: bool = False) -> str | None:
    """Return the path in `WanModel` of a module or bare parameter for its name there or in diffusers; None if unknown.

    Args:
        flat: whether the name has underscores instead of dots.
    """
    for pattern, official in _patterns(flat):
        if match := pattern.fullmatch(name):
            return official.format(*match.groups())
    return None


def diffusers_path(layer: str) -> str | None:
    """Return the diffusers path of a module of `WanModel`; None if there is none."""
    return rename([layer], DENOISER, to_diffusers=True).get(layer)


def _official(layer: str, kind: Kind, flat: bool, layer_path: LayerPath) -> str | None:
    """Return the layer or parameter that a tensor of this kind belongs to, by its name in the denoiser."""
    if kind == "modulation_difference":
        layer += "_modulation" if flat else ".modulation"
    official = layer_path(layer, flat=flat)
    if official is None or (kind in ("down", "up", "up_bias") and _NO_MATRIX.fullmatch(official)):
        return None
    if kind == "bias_difference":
        return f"{official}.bias"
    if kind == "weight_difference" and not _BARE.fullmatch(official):
        return f"{official}.weight"
    return official


def _without_prefix(layer: str) -> tuple[str, str, bool]:
    """Return the prefix, the layer without it, and whether the layer has underscores instead of dots."""
    if match := _FLAT.fullmatch(layer):
        return match[1], match[2], True
    match = _WRAPPERS.match(layer)
    prefix = match[0] if match else ""
    return prefix, layer.removeprefix(prefix), False


@cache
def _patterns(flat: bool) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Return patterns of layer names in both formats, with the names in `WanModel`."""
    rows = []
    for official, diffusers in DENOISER:
        for name in dict.fromkeys((official, diffusers)):
            written = name.replace(".", "_") if flat else name
            rows.append((re.compile(re.escape(written).replace(r"\{\}", r"(\d+)")), official))
    return tuple(rows)
