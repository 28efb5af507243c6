"""The toy family: a model is a folder with a file `toy.json`, which contains the seed of the random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.config import NOT_QUANTISED
from frostline.errors import ConfigError
from frostline.models.video_shape import Geometry

GEOMETRY = Geometry(temporal_stride=8, spatial_stride=8, spatial_multiple=16)
STAGES = ("text_encoder", "frame_encoder", "denoiser", "vae_decoder")
FROZEN_STAGES = ("text_encoder", "frame_encoder")
LORA_TARGETS = ("proj",)
PACKAGES = ()


@dataclass(frozen=True)
class ToySpec:
    name: str
    geometry: Geometry = GEOMETRY
    boundary: float = 0.0
    two_experts: bool = False
    needs_image: bool = True
    from_files: bool = True


def recognises(model: object) -> bool:
    if isinstance(model, str | Path):
        return (Path(model) / "toy.json").is_file()
    return type(model).__name__ == "ToyComponents"


def read_spec(model: str | Path) -> ToySpec:
    return ToySpec(Path(model).name)


def trained_video(model: str | Path) -> None:
    return None


def files(model: str | Path) -> list[Path]:
    return [Path(model) / "toy.json"]


def check_files(model: str | Path) -> None:
    json.loads((Path(model) / "toy.json").read_bytes())


def check_lora(model: str | Path, lora: Any) -> None:
    from frostline.stages.toy.networks import ToyDenoiser  # type: ignore[import-not-found]

    from frostline.models.lora.inject import check_targets

    check_targets(ToyDenoiser(), lora.target_modules or LORA_TARGETS)


def layer_path(name: str, *, flat: bool = False) -> str | None:
    return None if flat or not name.startswith("blocks.") else name


def diffusers_path(layer: str) -> str | None:
    """Return None, because diffusers does not contain the model."""
    return None


def check_adapter(model: str | Path, adapter: Any, expert: str) -> None:
    """Accept every adapter."""


def merge_adapter(model: str | Path, adapter: Any, expert: str, lora_scale: float, dtype: Any) -> Any:
    import torch

    from frostline.models import lora

    denoiser = load(model, torch.float32, "cpu", False).denoiser
    return lora.merge_adapter(denoiser.state_dict(), adapter, lora_scale, dtype)


def check_base_adapters(model: str | Path, adapters: Any) -> None:
    if adapters:
        raise ConfigError("the toy merges no adapters")


def load(
    model: str | Path,
    dtype: Any,
    device: Any,
    defer: bool,
    base_adapters: Any = (),
    live: bool = True,
    quantization: Any = NOT_QUANTISED,
    offload_blocks: int = 0,
) -> Any:
    check_base_adapters(model, base_adapters)
    from frostline.stages.toy.model import ToyComponents  # type: ignore[import-not-found]

    from frostline.models.block_offload import BlockOffload

    seed = json.loads((Path(model) / "toy.json").read_bytes())["seed"]
    components = ToyComponents.random(Path(model).name, seed)
    for part in (components.text_encoder, components.vae, components.denoiser):
        part.to(device, dtype)
    _quantise(components, dtype, quantization)
    if offload_blocks:
        denoiser = components.denoiser
        denoiser.offload = BlockOffload(denoiser.blocks, offload_blocks)
        for weight in denoiser.offload.weights():
            weight.data = weight.data.cpu()
    return components


def _quantise(components: Any, dtype: Any, quantization: Any) -> None:
    from frostline.models.quantization.linear import quantise_layers

    kinds = {"denoiser": quantization.quantization, "text_encoder": quantization.text_encoder_quantization}
    for part, kind in kinds.items():
        if kind != "none":
            quantise_layers(getattr(components, part), kind, dtype)


def video_model(components: Any, lora: Any) -> Any:
    from frostline.stages.toy.model import ToyVideoModel  # type: ignore[import-not-found]

    return ToyVideoModel(components, lora)


def empty_model(spec: ToySpec, dtype: Any, lora: Any, quantization: Any = NOT_QUANTISED) -> Any:
    from frostline.stages.toy.model import ToyComponents, ToyVideoModel  # type: ignore[import-not-found]

    components = ToyComponents.random(spec.name, 0)
    for part in (components.text_encoder, components.vae, components.denoiser):
        part.to("meta", dtype)
    _quantise(components, dtype, quantization)
    return ToyVideoModel(components, lora)
