"""LoRA adapters with PEFT: inject, disable, trace with a live scale, save and load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from frostline.errors import ConfigError
from frostline.models.quantization.linear import QuantisedLinear, quantised_layers
from frostline.models.wan.lora_targets import LORA_TARGETS

from . import FORMATS, PEFT, UniformLora, read_adapter, write_peft

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

# PEFT's own default name of an adapter.
ADAPTER = "default"


def inject_lora(
    model: nn.Module, rank: int, alpha: float | None = None, target_modules: Sequence[str] | None = None
) -> LoraConfig:
    """Freeze `model`, add trainable fp32 LoRA layers (B = 0: the output does not change yet), and return their config.

    Args:
        target_modules: names of the adapted layers; those of Wan's blocks if not given.

    Raises:
        ConfigError: the rank is not positive, a target matches no module or one that is not linear, or the model
            already has adapters. The model is then unchanged.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ConfigError(f"lora.rank must be at least 1, not {rank}")
    if lora_layers(model):
        raise ConfigError("the denoiser already has LoRA layers")
    target_modules = target_modules or LORA_TARGETS
    check_targets(model, target_modules)
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha if alpha is not None else rank, target_modules=list(target_modules))  # type: ignore[arg-type]
    if quantised_layers(model):
        from .quantised_layer import QuantisedLoraLinear

        config._register_custom_module({QuantisedLinear: QuantisedLoraLinear})
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return config


def inject_loras(
    models: Sequence[nn.Module], rank: int, alpha: float | None = None, target_modules: Sequence[str] | None = None
) -> LoraConfig:
    """Give each expert its own LoRA (see `inject_lora`); return a config that is valid for all of them.

    Args:
        target_modules: a name may match a layer of only one expert, if one has more blocks than the other.
    Raises:
        ConfigError: see `inject_lora`; or an expert has none of the layers.
    """
    targets = targets_of(models, target_modules)
    # Check all experts before one is changed.
    for model, each in zip(models, targets, strict=True):
        check_targets(model, each)
    configs = [inject_lora(model, rank, alpha, each) for model, each in zip(models, targets, strict=True)]
    configs[0].target_modules = {*(target_modules or LORA_TARGETS)}  # type: ignore[assignment]
    return configs[0]


def targets_of(models: Sequence[nn.Module], target_modules: Sequence[str] | None) -> list[Sequence[str]]:
    """Return the targets of each expert: those that match a layer of it, and those that match no expert.

    If there are neither for an expert, all targets are returned for it. `check_targets` reports targets that match
    nothing.
    """
    names = tuple(target_modules or LORA_TARGETS)
    known = [[name for name in names if _named(model, name)] for model in models]
    missing = [name for name in names if not any(name in each for each in known)]
    return [[*each, *missing] or names for each in known]


def check_targets(model: nn.Module, target_modules: Sequence[str]) -> None:
    """Check that each target matches linear layers of `model` only, by full path or by the end of the path.

    PEFT also adapts convolutions, but live engines and some programs that read adapters do not support them.

    Raises:
        ConfigError: a target is invalid; the message names it, and the module with its class.
    """
    for target in target_modules:
        found = _named(model, target)
        if not found:
            raise ConfigError(f"lora.target_modules: {target!r} matches no module of the denoiser")
        for name, module in found:
            if not isinstance(module, nn.Linear):
                raise ConfigError(
                    f"lora.target_modules: {target!r} matches {name}, a {type(module).__name__}: only "
                    "linear layers can have a LoRA"
                )


def _named(model: nn.Module, target: str) -> list[tuple[str, nn.Module]]:
    """Return the modules that a target matches, by path."""
    return [(name, m) for name, m in model.named_modules() if name == target or name.endswith(f".{target}")]


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Return all LoRA layers in module order."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter matrices by their name in `model`."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def lora_scale(model: nn.Module) -> float:
    """Return `alpha / rank`, the factor of `B A x`, whether or not the layers are enabled.

    Raises:
        ConfigError: there is no adapter, or its layers have different scales.
    """
    scales = {float(layer.scaling[ADAPTER]) for layer in lora_layers(model)}
    if len(scales) != 1:
        raise ConfigError(f"all LoRA layers must have the same scale, found {sorted(scales) or 'no adapter'}")
    return scales.pop()


def active_scale(model: nn.Module) -> float:
    """Return the current factor of `B A x` in the first LoRA layer; 0 if it is disabled.

    If `LoraSwitches` finds no conflict, all layers have this factor.
    """
    from peft.tuners.lora import LoraLayer

    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    return 0.0 if _disabled(layer) else float(layer.scaling[ADAPTER])


class _SwitchedOff:
    """A value of a layer's `_disable_adapters` that disables the layer in PEFT, and stores the value that it replaces.

    `adapters_off` sets it. Other threads may read the stored value at the same time, to pass the LoRA scale to an
    engine.
    """

    def __init__(self, otherwise: bool) -> None:
        self.otherwise = otherwise

    def __bool__(self) -> bool:
        return True


def _disabled(layer: LoraLayer) -> bool:
    """Return whether a layer is disabled, other than by `adapters_off`."""
    switch = layer._disable_adapters
    return switch.otherwise if isinstance(switch, _SwitchedOff) else bool(switch)


class LoraSwitches:
    """The state of LoRA layers, which users can change with PEFT at any time; read again at each access.

    Args:
        model: its LoRA layers are looked up once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = lora_layers(model)

    def conflict(self) -> str | None:
        """Return why the model is not equivalent to its weights plus the adapter at one scale, or None."""
        disabled = scaling = None
        for layer in self._layers:
            if layer.merged_adapters:
                return f"the LoRA is merged into the weights ({', '.join(layer.merged_adapters)})"
            if disabled is None:
                disabled = _disabled(layer)
            elif _disabled(layer) != disabled:
                return "some LoRA layers are disabled, others are not"
            if disabled:
                continue
            active = layer.active_adapters
            if len(active) != 1 or active[0] != ADAPTER:
                return f"the active adapter is {', '.join(active) or 'none'}, not {ADAPTER}"
            if scaling is None:
                scaling = layer.scaling[ADAPTER]
            elif layer.scaling[ADAPTER] is not scaling and layer.scaling[ADAPTER] != scaling:
                return f"the LoRA scale differs between layers ({scaling:g} and {layer.scaling[ADAPTER]:g})"
        return None


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Disable the adapters of `model` within the block, so that it computes exactly the base model."""
    layers = lora_layers(model)
    # Not `enable_adapters`, which also sets `requires_grad` of every matrix and would unfreeze frozen ones.
    saved = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = _SwitchedOff(_disabled(layer))  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, value in zip(layers, saved, strict=True):
            layer._disable_adapters = value


@contextmanager
def live_scale(model: nn.Module, scale: Tensor) -> Iterator[None]:
    """Enable every layer within the block, with the 0-dim tensor `scale` as factor, which is visible to a tracer."""
    layers = lora_layers(model)
    saved = [(layer.scaling[ADAPTER], layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] = scale  # type: ignore[assignment]
        layer._disable_adapters = False
    try:
        yield
    finally:
        for layer, (value, disabled) in zip(layers, saved, strict=True):
            layer.scaling[ADAPTER] = value
            layer._disable_adapters = disabled


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, like `PeftModel.save_pretrained`.

    Raises:
        DataError: the folder cannot be written.
    """
    prefix = FORMATS[PEFT].prefix
    tensors = {prefix + _plain(name): parameter for name, parameter in lora_parameters(model).items()}
    write_peft(tensors, config, folder)


def load_adapter(model: nn.Module, path: Path) -> LoraConfig:
    """Inject the adapter at `path` (a PEFT folder or a file, see `read_adapter`) into `model`, and return its config.

    Raises:
        ConfigError: the adapter cannot be read or does not match the model, which is then unchanged.
    """
    adapter = read_adapter(path).uniform()
    if lora_layers(model):
        raise ConfigError("the denoiser already has LoRA layers")
    _check_fit(model, adapter)
    config = inject_lora(model, adapter.rank, adapter.alpha, adapter.target_modules)
    copy_adapter(model, adapter)
    return config


def copy_adapter(model: nn.Module, adapter: UniformLora) -> None:
    """Copy the matrices of `adapter` to the LoRA layers of `model`.

    Raises:
        ConfigError: the layers differ from those of `adapter`; the model is then unchanged.
    """
    check_same_layers(model, adapter)
    tensors = _tensors(adapter)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.copy_(tensors[_plain(name)])


def check_same_layers(model: nn.Module, adapter: UniformLora) -> None:
    """Check that the LoRA layers of `model` are those of `adapter`.

    Raises:
        ConfigError: they differ.
    """
    shapes = {_plain(name): tuple(parameter.shape) for name, parameter in lora_parameters(model).items()}
    _compare(_tensors(adapter), shapes, adapter.path)


def fill_up(adapter: UniformLora, model: nn.Module) -> UniformLora:
    """Return the adapter with zero matrices added for the LoRA layers of `model` that it does not have."""
    added: dict[str, list[Tensor]] = {}
    for name, parameter in lora_parameters(model).items():
        layer, _, _ = name.partition(".lora_")
        if layer not in adapter.layers:
            added.setdefault(layer, []).append(torch.zeros(parameter.shape))
    return replace(adapter, layers={**adapter.layers, **{layer: (down, up) for layer, (down, up) in added.items()}})


def _plain(name: str) -> str:
    """Return the name of an adapter matrix on disk, without the name of the adapter."""
    return name.replace(f".{ADAPTER}.", ".")


def _check_fit(model: nn.Module, adapter: UniformLora) -> None:
    """Check, before anything is injected, that the model has the layers of the adapter with matching shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name in adapter.layers:
            shapes[f"{name}.lora_A.weight"] = (adapter.rank, layer.in_features)
            shapes[f"{name}.lora_B.weight"] = (layer.out_features, adapter.rank)
    _compare(_tensors(adapter), shapes, adapter.path)


def _tensors(adapter: UniformLora) -> dict[str, Tensor]:
    pairs = adapter.layers.items()
    return {f"{layer}.lora_{kind}.weight": pair["AB".index(kind)] for layer, pair in pairs for kind in "AB"}


def _compare(tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], weights: Path) -> None:
    if tensors.keys() != wanted.keys():
        odd = sorted(tensors.keys() ^ wanted.keys())
        raise ConfigError(f"{weights} does not match the model: {len(odd)} tensors differ, the first is {odd[0]}")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ConfigError(f"{weights}: {name} has shape {tuple(tensors[name].shape)}, the model requires {shape}")
