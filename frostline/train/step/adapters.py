"""The LoRA of each trained expert: its parameters and files.

One LoRA is a PEFT folder, for either expert. The LoRAs of two experts are two folders, `high_noise/` and `low_noise/`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from frostline.config import LoraSettings
from frostline.errors import ConfigError
from frostline.models.lora import EXPERT_PARTS, read_trained_adapters
from frostline.models.lora.inject import check_same_layers, copy_adapter, lora_parameters, lora_scale, save_adapter
from frostline.stages.families import family_of
from frostline.stages.video_model import Expert, VideoModel


def trained_experts(model: VideoModel) -> tuple[Expert, ...]:
    """Return the experts with a LoRA; the one for high noise levels comes first."""
    return tuple(expert for expert in model.experts if expert.trained)


def trainable_parameters(model: VideoModel) -> dict[str, nn.Parameter]:
    """Return the LoRA matrices by name, with the prefix `high_noise.` or `low_noise.` for two trained experts."""
    return {
        f"{part}.{name}" if part else name: parameter
        for part, expert in _by_part(model).items()
        for name, parameter in lora_parameters(expert.network).items()
    }


def save_adapters(model: VideoModel, folder: Path) -> None:
    """Write each LoRA as PEFT files.

    Raises:
        DataError: the folder cannot be written.
    """
    config = model.lora_config
    assert config is not None
    for part, expert in _by_part(model).items():
        save_adapter(expert.network, config, folder / part)


def load_adapters(model: VideoModel, folder: Path, lora: LoraSettings) -> None:
    """Copy adapters into the LoRA of each trained expert, in place, so that engines stay bound to it.

    Args:
        folder: as written by `save_adapters`, or in another layout; see `read_adapters`. For one trained expert, also
            a .safetensors file.
        lora: settings of the model's LoRA.
    Raises:
        ConfigError: files are missing, or the adapter differs from the model's; nothing is changed then.
    """
    read = read_trained_adapters(folder, family_of(model.components).layer_path, lora.experts)
    adapters = [adapter.uniform() for adapter in read.values()]
    pairs = [*zip(trained_experts(model), adapters, strict=True)]
    for expert, adapter in pairs:
        if adapter.rank != lora.rank:
            raise ConfigError(f"{adapter.path}: the adapter has rank {adapter.rank}, not {lora.rank}")
        if adapter.scale != (wanted := lora_scale(expert.network)):
            raise ConfigError(
                f"{adapter.path}: the adapter has a scale (alpha / rank) of {adapter.scale:g}, not {wanted:g}"
            )
        check_same_layers(expert.network, adapter)
    for expert, adapter in pairs:
        copy_adapter(expert.network, adapter)


def _by_part(model: VideoModel) -> dict[str, Expert]:
    """Return the trained experts by the names of their subfolders; "" for a single one."""
    trained = trained_experts(model)
    return {"": trained[0]} if len(trained) == 1 else dict(zip(EXPERT_PARTS.values(), trained, strict=True))
