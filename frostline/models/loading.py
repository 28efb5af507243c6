"""Load a Wan model from local files: the embedded tiny ones or a folder in the official layout."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from frostline.errors import ConfigError

from .components import WanComponents

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


_TINY = Path(__file__).parent / "tiny" / "weights"
_TOKENIZER = Path("google") / "umt5-xxl"
_DENOISER_PATTERN = "diffusion_pytorch_model*.safetensors"
# The official text encoder always pads to this many tokens.
_TEXT_LENGTH = 512
_BOUNDARY_I2V = 0.9


@dataclass(frozen=True)
class WanFiles:
    """Where the parts of a Wan model lie, and what their shapes do not tell.

    denoiser, denoiser_high_noise: folders with `diffusion_pytorch_model*.safetensors` and `config.json`.
    vae_config, text_encoder_config: constructor arguments where they differ from the official models'.
    """

    name: str
    denoiser: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    denoiser_high_noise: Path | None = None
    image_encoder: Path | None = None
    vae_config: dict[str, Any] = field(default_factory=dict)
    text_encoder_config: dict[str, Any] = field(default_factory=dict)
    text_length: int = _TEXT_LENGTH
    boundary: float = _BOUNDARY_I2V


def load_components(
    model: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> WanComponents:
    """Load a Wan model, frozen, in eval mode.

    Args:
        model: `tiny`, `tiny-moe` (two experts), `tiny-ti2v` (pinned first frame), or a folder that holds
            `diffusion_pytorch_model*.safetensors` (or `low_noise_model/` and `high_noise_model/`), `*VAE*`,
            `models_t5*`, `google/umt5-xxl/` and, for Wan2.1 image-to-video, `models_clip*`.
    Raises:
        ConfigError: a file is missing or its tensors do not fit; the message names it.
    """
    files = find_files(model)
    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer, WanTextEncoder

    high_noise = files.denoiser_high_noise
    components = WanComponents(
        name=files.name,
        text_encoder=_load(lambda: WanTextEncoder(**files.text_encoder_config), [files.text_encoder], dtype, device),
        tokenizer=HuggingfaceTokenizer(str(files.tokenizer), seq_len=files.text_length, clean="whitespace"),
        vae=_load_vae(files, dtype, device),
        denoiser=_load_denoiser(files.denoiser, dtype, device),
        denoiser_high_noise=_load_denoiser(high_noise, dtype, device) if high_noise else None,
        image_encoder=_load_image_encoder(files.image_encoder, dtype, device) if files.image_encoder else None,
        boundary=files.boundary,
    )
    components.vae.scale = [part.to(device) for part in components.vae.scale]
    for _, module in components.modules():
        module.eval().requires_grad_(False)
    return components


def find_files(model: str | Path) -> WanFiles:
    """Where the parts of `model` lie; see `load_components`."""
    name = str(model)
    if name in ("tiny", "tiny-moe", "tiny-ti2v"):
        return _tiny_files(name)
    folder = Path(model)
    if not folder.is_dir():
        raise ConfigError(f"{name} is no folder and none of the embedded models tiny, tiny-moe, tiny-ti2v")
    two_experts = (folder / "low_noise_model").is_dir()
    denoiser = folder / "low_noise_model" if two_experts else folder
    config = _read_config(folder)
    return WanFiles(
        name=folder.resolve().name,
        denoiser=denoiser,
        denoiser_high_noise=folder / "high_noise_model" if two_experts else None,
        vae=_only_file(folder, "*VAE*", "the VAE"),
        text_encoder=_only_file(folder, "models_t5*", "the text encoder"),
        tokenizer=_existing(folder / _TOKENIZER, "the tokenizer"),
        image_encoder=_only_file(folder, "models_clip*", "the image encoder")
        if any(folder.glob("models_clip*"))
        else None,
        vae_config=config.get("vae", {}),
        text_encoder_config=config.get("text_encoder", {}),
        text_length=config.get("text_len", _TEXT_LENGTH),
        boundary=config.get("boundary", _BOUNDARY_I2V),
    )


def _tiny_files(name: str) -> WanFiles:
    base = find_files(_TINY / "tiny")
    shared = {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "vae_config": base.vae_config,
        "text_encoder_config": base.text_encoder_config,
        "text_length": base.text_length,
    }
    if name == "tiny-moe":
        return WanFiles(name, base.denoiser, denoiser_high_noise=_TINY / "tiny-moe" / "high_noise_model", **shared)
    return WanFiles(name, base.denoiser if name == "tiny" else _TINY / name, **shared)


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise ConfigError(f"{what} is missing: {path}")
    return path


def _only_file(folder: Path, pattern: str, what: str) -> Path:
    found = sorted(path for path in folder.glob(pattern) if path.suffix in (".safetensors", ".pth"))
    if len(found) != 1:
        raise ConfigError(f"{what}: expected one file {pattern} (.safetensors or .pth) in {folder}, found {len(found)}")
    return found[0]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error


def _load(
    build: Callable[..., nn.Module],
    paths: list[Path],
    dtype: torch.dtype,
    device: str | torch.device,
    converter: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> Any:
    from diffsynth.core.loader.model import load_model

    try:
        return load_model(
            build,
            [str(path) for path in paths],
            torch_dtype=dtype,
            device=str(device),
            state_dict_converter=converter,
            state_dict=state_dict,
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        first_lines = " ".join(str(error).split("\n")[:3])
        raise ConfigError(f"{', '.join(map(str, paths))} cannot be loaded: {first_lines}") from error


def _load_vae(files: WanFiles, dtype: torch.dtype, device: str | torch.device) -> Any:
    from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_, WanVideoVAE, WanVideoVAE38
    from diffsynth.utils.state_dict_converters.wan_video_vae import WanVideoVAEStateDictConverter

    state_dict = _read_tensors([files.vae], dtype, device)
    # The VAE of Wan2.2 TI2V folds 2×2 pixels into the channels of its first convolution.
    folds_pixels = state_dict.get("encoder.conv1.weight", torch.empty(0, 3)).shape[1] == 12

    def build() -> nn.Module:
        vae = WanVideoVAE38() if folds_pixels else WanVideoVAE()
        if files.vae_config:
            vae.model = (VideoVAE38_ if folds_pixels else VideoVAE_)(**files.vae_config)  # type: ignore[assignment]
        return vae

    return _load(build, [files.vae], dtype, device, WanVideoVAEStateDictConverter, state_dict)


def _read_tensors(paths: list[Path], dtype: torch.dtype, device: str | torch.device) -> dict[str, torch.Tensor]:
    from diffsynth.core.loader.file import load_state_dict

    try:
        return load_state_dict([str(path) for path in paths], dtype, str(device))
    except Exception as error:  # safetensors and torch.load raise many types of their own
        names = ", ".join(map(str, paths))
        raise ConfigError(f"{names} cannot be read: {str(error).splitlines()[0]}") from error


def _load_denoiser(folder: Path, dtype: torch.dtype, device: str | torch.device) -> Any:
    from diffsynth.models.wan_video_dit import WanModel

    paths = sorted(folder.glob(_DENOISER_PATTERN))
    if not paths:
        raise ConfigError(f"the denoiser is missing: no {_DENOISER_PATTERN} in {folder}")
    state_dict = _read_tensors(paths, dtype, device)
    try:
        arguments = denoiser_arguments(state_dict, _read_config(folder))
    except KeyError as error:
        raise ConfigError(f"{folder} holds no Wan denoiser: {error}") from error
    return _load(lambda: WanModel(**arguments), paths, dtype, device, state_dict=state_dict)


def denoiser_arguments(state_dict: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """The constructor arguments of `WanModel`: what the tensors' shapes tell, the rest from `config.json`."""
    dim, in_dim, *patch_size = state_dict["patch_embedding.weight"].shape
    pins_first_frame = config.get("model_type") == "ti2v"
    has_image_input = "img_emb.proj.0.weight" in state_dict
    out_dim = state_dict["head.head.weight"].shape[0] // math.prod(patch_size)
    return {
        "dim": dim,
        "in_dim": in_dim,
        "ffn_dim": state_dict["blocks.0.ffn.0.weight"].shape[0],
        "out_dim": out_dim,
        "text_dim": state_dict["text_embedding.0.weight"].shape[1],
        "freq_dim": state_dict["time_embedding.0.weight"].shape[1],
        "eps": config.get("eps", 1e-6),
        "patch_size": tuple(patch_size),
        "num_heads": config.get("num_heads", dim // 128),
        "num_layers": len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")}),
        "has_image_input": has_image_input,
        "has_image_pos_emb": "img_emb.emb_pos" in state_dict,
        "require_clip_embedding": has_image_input,
        "require_vae_embedding": in_dim > out_dim,
        "seperated_timestep": pins_first_frame,
        "fuse_vae_embedding_in_latents": pins_first_frame,
    }


def _load_image_encoder(path: Path, dtype: torch.dtype, device: str | torch.device) -> Any:
    from diffsynth.models.wan_video_image_encoder import WanImageEncoder
    from diffsynth.utils.state_dict_converters.wan_video_image_encoder import (
        WanImageEncoderStateDictConverter,
    )

    return _load(WanImageEncoder, [path], dtype, device, WanImageEncoderStateDictConverter)
