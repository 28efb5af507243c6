"""Wan 2.1 and 2.2 as a family; see `Family` for the functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from frostline.config import NOT_QUANTISED
from frostline.models.wan.lora_targets import LORA_TARGETS
from frostline.models.wan.video_shape import GEOMETRY

# torch takes seconds to import; reporting a mistake in a configuration file must not wait for it.
if TYPE_CHECKING:
    import torch

    from frostline.config import BaseAdapter, LoraSettings, QuantizationSettings
    from frostline.experts import ExpertName
    from frostline.models.checkpoints.checkpoint_files import Entry
    from frostline.models.lora import Adapter
    from frostline.models.wan.components import WanComponents
    from frostline.models.wan.model_spec import ModelSpec

    from .model import WanVideoModel

FROZEN_STAGES = ("text_encoder", "image_encoder", "vae_encoder", "denoiser_high_noise")
STAGES = ("text_encoder", "image_encoder", "vae_encoder", "denoiser", "denoiser_high_noise", "vae_decoder")
PACKAGES = ("diffsynth",)

__all__ = ["FROZEN_STAGES", "GEOMETRY", "LORA_TARGETS", "PACKAGES", "STAGES"]


def recognises(model: object) -> bool:
    """Return whether these are components of a Wan model, or files that could be one."""
    if not isinstance(model, str | Path | list | tuple):
        from frostline.models.wan.components import WanComponents

        return isinstance(model, WanComponents)
    return True


def read_spec(model: str | Path) -> ModelSpec:
    """Return the sizes of a model from its files, or of the release with its name."""
    from frostline.models.checkpoints.releases import read_spec

    return read_spec(model)


def trained_video(model: str | Path) -> tuple[int, int, int] | None:
    """Return the frames, height and width that a model was trained with, if known."""
    from frostline.models.checkpoints.checkpoint_files import EMBEDDED, EMBEDDED_VIDEO

    return EMBEDDED_VIDEO if str(model) in EMBEDDED else None


def files(model: str | Path) -> list[Path]:
    """Return all files that are needed to load a model."""
    from frostline.models.checkpoints.checkpoint_files import find_files

    return [*find_files(model).paths()]


def check_files(model: str | Path) -> None:
    """Raise the errors of `load` that can be detected without reading weights."""
    from frostline.models.checkpoints.loading import check_files

    check_files(model)


def check_lora(model: str | Path, lora: LoraSettings) -> None:
    """Raise a ConfigError if the target modules are not linear layers of the experts with a LoRA."""
    from frostline.models.lora.inject import check_targets, targets_of

    spec = read_spec(model)
    experts = {"denoiser": lora.has_lora("low"), "denoiser_high_noise": lora.has_lora("high") and spec.two_experts}
    networks = [spec.build(name) for name, adapted in experts.items() if adapted]
    for network, targets in zip(networks, targets_of(networks, lora.target_modules), strict=True):
        check_targets(network, targets)


def layer_path(name: str, *, flat: bool = False) -> str | None:
    """Return the path of a layer in the denoiser; `name` is its name there or in diffusers."""
    from frostline.models.lora.names import denoiser_path

    return denoiser_path(name, flat=flat)


def diffusers_path(layer: str) -> str | None:
    """Return the diffusers path of a layer of the denoiser."""
    from frostline.models.lora import names

    return names.diffusers_path(layer)


def check_adapter(model: str | Path, adapter: Adapter, expert: ExpertName) -> None:
    """Raise a ConfigError if the adapter is for another model."""
    from frostline.models.checkpoints.checkpoint_files import find_files
    from frostline.models.lora import check_fits

    check_fits(adapter, find_files(model).expert(expert).shapes)


def merge_adapter(
    model: str | Path, adapter: Adapter, expert: ExpertName, lora_scale: float, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return the weights of an expert, or of the only denoiser, with an adapter merged.

    The names are those of the official release, for any format of the model.
    """
    from frostline.models import lora
    from frostline.models.checkpoints.checkpoint_files import find_files

    denoiser = find_files(model).expert(expert)
    lora.check_fits(adapter, denoiser.shapes)
    return lora.merge_adapter(denoiser.read_exact(), adapter, lora_scale, dtype or denoiser.compute_dtype)


def check_base_adapters(model: str | Path, adapters: Sequence[BaseAdapter]) -> None:
    """Raise a ConfigError if an adapter cannot be read, is for another model, or names a missing expert."""
    if adapters:
        from .base_adapters import check

        check(read_spec(model), adapters)


def load(
    model: str | Path | Sequence[Entry],
    dtype: torch.dtype,
    device: torch.device,
    defer: bool,
    base_adapters: Sequence[BaseAdapter] = (),
    live: bool = True,
    quantization: QuantizationSettings = NOT_QUANTISED,
    offload_blocks: int = 0,
) -> WanComponents:
    """Load a model, frozen, in eval mode, with adapters merged into its denoisers; see `load_components`."""
    from frostline.models.checkpoints.checkpoint_files import find_files
    from frostline.models.checkpoints.loading import LIVE_PARTS, load_components
    from frostline.models.lazy_weights import FROZEN_PARTS

    deferred = (*(FROZEN_PARTS if defer else ()), *(() if live else LIVE_PARTS))
    load = partial(
        load_components,
        *(model, dtype, device),
        defer=deferred,
        storage=_storage(quantization),
        offload_blocks=offload_blocks,
    )
    if not base_adapters:
        return load()
    from .base_adapters import merged_reads

    files = find_files(model)
    reads = merged_reads(files.spec, base_adapters)
    for network, read in reads.items():
        # Check now: weights that stay on disk are merged later, and an adapter that does not match would be found late.
        read.check(files.networks[network].shapes)
    return load(reads=reads)


def video_model(components: WanComponents, lora: LoraSettings | None) -> WanVideoModel:
    """Return a loaded model with or without a LoRA."""
    from frostline.models.wan.vae import use_onednn_conv3d

    from .model import WanVideoModel

    # For live and frozen uses, so that engines are compared with the fastest plain PyTorch.
    use_onednn_conv3d(components.vae)
    model = WanVideoModel.of(components, lora)
    for expert in (model.denoiser, model.denoiser_high_noise):
        if expert is not None:
            expert.to(components.device)
    return model


def _storage(quantization: QuantizationSettings) -> dict[str, str]:
    """Return the storage format of each quantised network."""
    denoiser, text_encoder = quantization.quantization, quantization.text_encoder_quantization
    kinds = {"denoiser": denoiser, "denoiser_high_noise": denoiser, "text_encoder": text_encoder}
    return {network: kind for network, kind in kinds.items() if kind != "none"}


def empty_model(
    spec: ModelSpec, dtype: torch.dtype, lora: LoraSettings, quantization: QuantizationSettings = NOT_QUANTISED
) -> WanVideoModel:
    """Return a model whose parameters are on the meta device."""
    from frostline.models.meta_tensors import meta_parameters
    from frostline.models.quantization.linear import quantise_layers
    from frostline.models.wan.components import WanComponents

    from .model import WanVideoModel

    networks: dict[str, Any] = {name: spec.build(name).eval().requires_grad_(False).to(dtype) for name in spec.networks}
    for name, kind in _storage(quantization).items():
        if name in networks:
            quantise_layers(networks[name], kind, dtype)
    # A placeholder: without weights, no prompt is tokenised.
    tokenizer: Any = SimpleNamespace(seq_len=spec.text_length)
    with meta_parameters():
        return WanVideoModel.of(WanComponents(spec=spec, tokenizer=tokenizer, **networks), lora)
