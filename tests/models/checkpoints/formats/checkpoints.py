"""Wan checkpoints on disk: every variant in every layout, small, with random weights and the layout's tensor names."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_image_encoder import WanImageEncoder
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_
from safetensors.torch import load_file, save_file
from small_wan import DENOISER, TEXT, TOKENIZER, VAE
from torch import Tensor, nn

from frostline.models.checkpoints.formats.convert import to_diffusers
from frostline.models.checkpoints.formats.names import Part
from frostline.models.meta_tensors import meta_parameters

TINY = TOKENIZER.parents[1]
VAE38 = {"dim": 8, "z_dim": 48, "dec_dim": 12, "num_res_blocks": 1}
IMAGE_LAYERS = 2


@dataclass(frozen=True)
class Variant:
    """A Wan variant.

    Attributes:
        says: frostline's name of the variant.
        denoiser: the arguments of diffsynth's `WanModel`.
        experts: the number of experts, 1 or 2.
        vae: the sizes of the VAE.
        boundary: the noise level between two experts, as in the release.
        model_type: `model_type` in `config.json`.
    """

    says: str
    denoiser: dict[str, Any]
    experts: int = 1
    vae: dict[str, Any] = field(default_factory=lambda: VAE)
    boundary: float = 0.9
    model_type: str = "i2v"


VARIANTS = {
    "Wan2.1-T2V": Variant("text-to-video", {**DENOISER, "in_dim": 16}, model_type="t2v"),
    "Wan2.1-I2V": Variant(
        "image-to-video with CLIP", {**DENOISER, "has_image_input": True, "require_clip_embedding": True}
    ),
    "Wan2.2-I2V-A14B": Variant("image-to-video without CLIP, two experts", DENOISER, experts=2),
    "Wan2.2-T2V-A14B": Variant(
        "text-to-video, two experts", {**DENOISER, "in_dim": 16}, experts=2, boundary=0.875, model_type="t2v"
    ),
    "Wan2.2-TI2V": Variant(
        "text-and-image-to-video, fixed first frame",
        {**DENOISER, "in_dim": 48, "out_dim": 48, "num_layers": 1},
        vae=VAE38,
        model_type="ti2v",
    ),
}


def random_tensors(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Return random values for all tensors of a model, which may be on the meta device."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.02 * torch.randn(tensor.shape, generator=generator)).to(dtype)
        for name, tensor in model.state_dict().items()
    }


def make_tensors(variant: Variant) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of every network of a variant, by their names in Wan's release."""
    with meta_parameters():
        vae = (VideoVAE38_ if variant.vae is VAE38 else VideoVAE_)(**variant.vae)
        networks: dict[str, nn.Module] = {
            "denoiser": WanModel(**variant.denoiser),
            "vae": vae,
            "text_encoder": WanTextEncoder(**TEXT),
        }
        if variant.experts == 2:
            networks["denoiser_high_noise"] = WanModel(**variant.denoiser)
        if variant.denoiser["has_image_input"]:
            clip: Any = WanImageEncoder().model
            clip.visual.transformer = clip.visual.transformer[:IMAGE_LAYERS]
            networks["image_encoder"] = clip
    return {name: random_tensors(model, seed=seed) for seed, (name, model) in enumerate(networks.items())}


def save_shards(tensors: dict[str, Tensor], folder: Path, stem: str, index: bool = True) -> list[Path]:
    """Write two safetensors files in alphabetical order of the names, like releases, with or without the index."""
    folder.mkdir(parents=True, exist_ok=True)
    names, half = sorted(tensors), len(tensors) // 2
    where, paths = {}, []
    for number, shard in enumerate((names[:half], names[half:]), start=1):
        path = folder / f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in shard}, path, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, path.name))
        paths.append(path)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return paths


def write_official(folder: Path, variant: Variant, tensors: dict[str, dict[str, Tensor]]) -> Path:
    """Write the layout of Wan's releases: safetensors in shards for the denoisers, torch files for all others."""
    shutil.copytree(TOKENIZER, folder / "google" / "umt5-xxl")
    torch.save(tensors["vae"], folder / "Wan2.1_VAE.pth")
    torch.save(tensors["text_encoder"], folder / "models_t5_umt5-xxl-enc-bf16.pth")
    if "image_encoder" in tensors:
        # The released file also contains the text tower of CLIP.
        with_text = {**tensors["image_encoder"], "textual.head.weight": torch.zeros(2)}
        torch.save(with_text, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    keys = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim")
    config = {"_class_name": "WanModel", "model_type": variant.model_type, **{k: variant.denoiser[k] for k in keys}}
    for expert, name in denoiser_folders(variant, "low_noise_model", "high_noise_model"):
        save_shards(tensors[expert], folder / name, "diffusion_pytorch_model")
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def write_diffusers(folder: Path, variant: Variant, tensors: dict[str, dict[str, Tensor]]) -> Path:
    """Write the layout in which diffusers saves a pipeline; of two experts, `transformer` is the high-noise one."""
    folder.mkdir()
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    index: dict[str, Any] = {"_class_name": "WanPipeline", "scheduler": ["diffusers", "UniPCMultistepScheduler"]}
    if variant.experts == 2:
        index["boundary_ratio"] = variant.boundary
    (folder / "model_index.json").write_text(json.dumps(index))
    for expert, name in denoiser_folders(variant, "transformer_2", "transformer", only="transformer"):
        save_shards(to_diffusers("denoiser", tensors[expert]), folder / name, "diffusion_pytorch_model")
        config = {"num_attention_heads": variant.denoiser["num_heads"], "eps": variant.denoiser["eps"]}
        (folder / name / "config.json").write_text(json.dumps(config))
    stems: dict[Part, str] = {"vae": "diffusion_pytorch_model", "text_encoder": "model", "image_encoder": "model"}
    for part, stem in stems.items():
        if part in tensors:
            (folder / part).mkdir()
            spelled = {name: tensor.contiguous() for name, tensor in to_diffusers(part, tensors[part]).items()}
            save_file(spelled, folder / part / f"{stem}.safetensors")
    return folder


def write_files(folder: Path, variant: Variant, tensors: dict[str, dict[str, Tensor]]) -> Sequence[Any]:
    """Write files like those in a ComfyUI folder.

    Returns:
        The list to load: single files, a list of shards, and the tokenizer.
    """
    folder.mkdir()
    listed: list[Any] = [str(TOKENIZER)]
    for name, content in tensors.items():
        wrapped = {f"model.diffusion_model.{n}": t for n, t in content.items()} if name == "denoiser" else content
        stem = {"denoiser": "wan_low_noise", "denoiser_high_noise": "wan_high_noise"}.get(name, f"wan_{name}")
        if name == "denoiser":
            listed.append(save_shards(wrapped, folder, stem, index=False))
        else:
            save_file(wrapped, folder / f"{stem}.safetensors")
            listed.append(folder / f"{stem}.safetensors")
    return listed


def tiny_with(folder: Path, denoiser: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Copy the built-in model, with another file for the denoiser; return the folder."""
    shutil.copytree(TINY, folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in denoiser.items()}, path, metadata=metadata)
    return folder


def tiny_tensors() -> dict[str, Tensor]:
    """Return the tensors of the built-in model's denoiser, fp16."""
    return load_file(TINY / "diffusion_pytorch_model.safetensors")


LAYOUTS = {"official": write_official, "diffusers": write_diffusers, "files": write_files}


def denoiser_folders(variant: Variant, low: str, high: str, only: str = ".") -> Iterator[tuple[str, str]]:
    """Yield the network and the folder of each denoiser."""
    if variant.experts == 1:
        yield "denoiser", only
    else:
        yield from (("denoiser", low), ("denoiser_high_noise", high))
