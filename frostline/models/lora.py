"""LoRA adapters through PEFT: inject, switch off, trace with a live scale, save and load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from frostline.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

TARGET_MODULES = ("q", "k", "v", "o", "ffn.0", "ffn.2")
# The name PEFT itself gives to a model's only adapter.
ADAPTER = "default"
_PEFT_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def inject_lora(
    model: nn.Module, rank: int, alpha: float | None = None, target_modules: Sequence[str] = TARGET_MODULES
) -> LoraConfig:
    """Freeze `model`, add trainable fp32 LoRA layers (B = 0: no change of output yet), return their config.

    Raises:
        ConfigError: the rank is not positive, no module matches, or adapters are there already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ConfigError(f"lora.rank must be at least 1, not {rank}")
    if lora_layers(model):
        raise ConfigError("the denoiser has LoRA layers already")
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha if alpha is not None else rank, target_modules=list(target_modules))  # type: ignore[arg-type]
    try:
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules {list(target_modules)} fit no module: {error}") from error
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return config


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """All LoRA layers in module order."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter matrices by their name in `model`."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def lora_scale(model: nn.Module) -> float:
    """`alpha / rank`, the factor on `B A x`.

    Raises:
        ConfigError: there is no adapter, or its layers differ in scale.
    """
    scales = {float(layer.scaling[ADAPTER]) for layer in lora_layers(model)}
    if len(scales) != 1:
        raise ConfigError(f"one LoRA scale for all layers is needed, found {sorted(scales) or 'no adapter'}")
    return scales.pop()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block `model` computes what it computed before the adapters came, exactly."""
    layers = lora_layers(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def live_scale(model: nn.Module, scale: Tensor) -> Iterator[None]:
    """Within the block every layer multiplies by the 0-dim tensor `scale`, which a tracer then sees."""
    layers = lora_layers(model)
    saved = [layer.scaling[ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] = scale  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, value in zip(layers, saved, strict=True):
            layer.scaling[ADAPTER] = value


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as `PeftModel.save_pretrained` does."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): parameter.detach().cpu().contiguous()
        for name, parameter in lora_parameters(model).items()
    }
    partial = folder / f"{_WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / _WEIGHTS)
    config.save_pretrained(str(folder))


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Inject the adapter that `folder` holds (PEFT files) into `model` and return its config.

    Raises:
        ConfigError: files are missing, or their tensors do not fit the model.
    """
    saved = _read_config(folder)
    try:
        config = inject_lora(model, saved.r, saved.lora_alpha, tuple(saved.target_modules or ()))
    except ConfigError as error:
        raise ConfigError(f"{folder / _CONFIG}: {error}") from error
    _copy_tensors(model, folder / _WEIGHTS)
    return config


def copy_adapter(model: nn.Module, config: LoraConfig, folder: Path) -> None:
    """Copy the adapter that `folder` holds (PEFT files) into the one that `model` has: into the same memory.

    Raises:
        ConfigError: files are missing, or it is another adapter than `config` describes.
    """
    saved = _read_config(folder)
    for name in ("r", "lora_alpha", "target_modules"):
        theirs, ours = getattr(saved, name), getattr(config, name)
        if theirs != ours:
            raise ConfigError(f"{folder / _CONFIG}: the adapter has {name} {theirs}, not {ours}")
    _copy_tensors(model, folder / _WEIGHTS)


def _copy_tensors(model: nn.Module, weights: Path) -> None:
    tensors = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in _read_tensors(weights).items()}
    parameters = {name.replace(f".{ADAPTER}.", "."): p for name, p in lora_parameters(model).items()}
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())
        raise ConfigError(f"{weights} does not fit the model: {len(odd)} tensors differ, the first is {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise ConfigError(
                    f"{weights}: {name} is {tuple(tensors[name].shape)}, the model wants {tuple(parameter.shape)}"
                )
            parameter.copy_(tensors[name])


def _read_config(folder: Path) -> LoraConfig:
    from peft import LoraConfig

    path = folder / _CONFIG
    if not path.is_file() or not (folder / _WEIGHTS).is_file():
        raise ConfigError(f"{folder} holds no adapter: {_CONFIG} and {_WEIGHTS} are needed")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # peft raises many types of its own
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, LoraConfig) or not isinstance(config.target_modules, set):
        raise ConfigError(f"{path} is no LoRA on a list of layers")
    for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            raise ConfigError(f"{path}: {name} is not supported, one rank and one scale for all layers are")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
