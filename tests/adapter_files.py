"""Adapters of the tiny model, in memory and in files in the formats of many programs."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from frostline.models.checkpoints.loading import load_components
from frostline.models.lora import Adapter, LoraPair, read_adapter, write_adapter
from frostline.models.lora.inject import inject_lora, lora_parameters, save_adapter
from frostline.models.wan.denoiser import Denoiser


def tiny_denoiser(dtype: torch.dtype = torch.float32) -> Any:
    return load_components("tiny", dtype).denoiser


@torch.no_grad()
def output(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(shape, generator=generator) for shape in ((2, 16, 2, 4, 6), (2, 16, 64), (2, 20, 2, 4, 6))]
    return Denoiser(model)(inputs[0], torch.tensor([900.0, 300.0]), inputs[1], inputs[2])


def make_adapter(folder: Path, alpha: float, rank: int = 4, **arguments: Any) -> tuple[Any, Adapter]:
    """Return a denoiser with a random adapter, and the adapter as it was read from its folder."""
    model = tiny_denoiser()
    config = inject_lora(model, rank, alpha, **arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, config, folder)
    return model, read_adapter(folder)


def place(folder: Path, name: str) -> Path:
    return folder / name if name == "peft" else folder / f"{name}.safetensors"


def with_alpha(adapter: Adapter, alpha: float) -> Adapter:
    return replace(adapter, layers={layer: replace(pair, alpha=alpha) for layer, pair in adapter.layers.items()})


def uneven(adapter: Adapter) -> Adapter:
    """Return the adapter with ranks from 1 up, and with alphas that alternate between 1, 2 and 4."""
    layers = {}
    for index, (layer, pair) in enumerate(adapter.layers.items()):
        rank = 1 + index % pair.rank
        layers[layer] = LoraPair(pair.down[:rank].clone(), pair.up[:, :rank].clone(), 2.0 ** (index % 3))
    assert len({pair.rank for pair in layers.values()}) > 1
    assert len({pair.scale for pair in layers.values()}) > 1
    return replace(adapter, layers=layers)


def same_update(one: Adapter, other: Adapter) -> bool:
    """Return whether both adapters change the same layers by the same amounts."""
    return one.layers.keys() == other.layers.keys() and all(
        torch.allclose(pair.delta(), other.layers[layer].delta(), rtol=1e-5, atol=1e-7)
        for layer, pair in one.layers.items()
    )


def write_flat(
    adapter: Adapter,
    path: Path,
    name: Callable[[str], str],
    matrices: tuple[str, str],
    alpha: bool = True,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write an adapter as one file; return its path.

    Args:
        name: returns the name of a layer in the file.
        matrices: the names of A and B.
        alpha: whether alpha is written; otherwise the scale is multiplied into B.
    """
    tensors: dict[str, Tensor] = {}
    for layer, pair in adapter.layers.items():
        tensors[f"{name(layer)}.{matrices[0]}.weight"] = pair.down
        tensors[f"{name(layer)}.{matrices[1]}.weight"] = pair.up if alpha else pair.scale * pair.up
        if alpha:
            tensors[f"{name(layer)}.alpha"] = torch.tensor(float(pair.alpha))
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata=metadata)
    return path


def write_diffusers(path: Path, adapter: Adapter, prefix: str = "transformer.", **changes: Any) -> None:
    """Write an adapter like `save_lora_weights` of diffusers: trained matrices, with PEFT's config in the header."""
    pair = next(iter(adapter.layers.values()))
    write_adapter(with_alpha(adapter, pair.rank), "diffusers", path)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    config = LoraConfig(r=pair.rank, lora_alpha=int(pair.alpha), target_modules=targets).to_dict()
    settings = {**config, "target_modules": targets, **changes}
    packed = json.dumps({prefix + name: value for name, value in settings.items()})
    tensors = {name.replace("transformer.", prefix): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": packed})


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path)


# By name in the file: the parameter of the model that a difference changes.
DIFFERENCES = {
    "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
    "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
    "diffusion_model.blocks.1.norm3.diff": "blocks.1.norm3.weight",
    "diffusion_model.blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
    "diffusion_model.blocks.0.diff_m": "blocks.0.modulation",
    "diffusion_model.blocks.1.modulation.diff": "blocks.1.modulation",
    "diffusion_model.head.diff_m": "head.modulation",
    "diffusion_model.head.head.diff": "head.head.weight",
    "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    "diffusion_model.patch_embedding.diff_b": "patch_embedding.bias",
}


def write_distilled(folder: Path) -> tuple[Adapter, dict[str, Tensor], Path]:
    """Write a LoRA like those of distilled models, with differences of whole parameters."""
    _, adapter = make_adapter(folder / "trained", 6)
    path = write_flat(adapter, folder / "lora.safetensors", "diffusion_model.{}".format, ("lora_down", "lora_up"))
    shapes = {name: tensor.shape for name, tensor in tiny_denoiser().state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    differences = {
        name: 0.1 * torch.randn(shapes[parameter], generator=generator) for name, parameter in DIFFERENCES.items()
    }
    save_file({**load_file(path), **differences}, path)
    return adapter, differences, path
