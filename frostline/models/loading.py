"""Load a Wan model from local files: the embedded tiny ones or a folder in the official layout."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from frostline.errors import ConfigError

from .components import WanComponents
from .files import WanFiles, find_files, read_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer
    from torch import nn


_DENOISER_PATTERN = "diffusion_pytorch_model*.safetensors"


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
    from diffsynth.models.wan_video_text_encoder import WanTextEncoder

    high_noise = files.denoiser_high_noise
    components = WanComponents(
        name=files.name,
        text_encoder=_load(lambda: WanTextEncoder(**files.text_encoder_config), [files.text_encoder], dtype, device),
        tokenizer=_load_tokenizer(files.tokenizer, files.text_length),
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


def _load(
    build: Callable[..., nn.Module],
    paths: list[Path],
    dtype: torch.dtype,
    device: str | torch.device,
    converter: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> Any:
    from diffsynth.core.loader.model import load_model

    if state_dict is None:
        state_dict = _read_tensors(paths, dtype, device)
    try:
        return load_model(
            build,
            [str(path) for path in paths],
            torch_dtype=dtype,
            device=str(device),
            state_dict_converter=converter,
            state_dict=state_dict,
        )
    except (RuntimeError, ValueError, TypeError, OSError, KeyError) as error:
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

    names = ", ".join(map(str, paths))
    try:
        return load_state_dict([str(path) for path in paths], dtype, str(device))
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{names} cannot be read: it is damaged, or holds more than tensors") from error
    except Exception as error:  # safetensors and torch.load raise many types of their own
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{names} cannot be read: {first_line}") from error


def _load_denoiser(folder: Path, dtype: torch.dtype, device: str | torch.device) -> Any:
    from diffsynth.models.wan_video_dit import WanModel

    paths = _denoiser_shards(folder)
    state_dict = _read_tensors(paths, dtype, device)
    try:
        arguments = denoiser_arguments(state_dict, read_config(folder))
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"{folder} holds no Wan denoiser: {error}") from error
    return _load(lambda: WanModel(**arguments), paths, dtype, device, state_dict=state_dict)


def _denoiser_shards(folder: Path) -> list[Path]:
    """All files of a denoiser; without the last one, a model with fewer blocks would seem whole."""
    paths = sorted(folder.glob(_DENOISER_PATTERN))
    if not paths:
        raise ConfigError(f"the denoiser is missing: no {_DENOISER_PATTERN} in {folder}")
    for path in paths:
        of_many = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.safetensors)", path.name)
        if of_many is None:
            continue
        head, tail, count = of_many.groups()
        for shard in (folder / f"{head}{number:05d}{tail}" for number in range(1, int(count) + 1)):
            if not shard.is_file():
                raise ConfigError(f"the denoiser is incomplete: {shard} is missing")
    return paths


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


def _load_tokenizer(folder: Path, text_length: int) -> HuggingfaceTokenizer:
    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer

    try:
        return HuggingfaceTokenizer(str(folder), seq_len=text_length, clean="whitespace")
    except Exception as error:  # transformers raises many types of its own
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"the tokenizer in {folder} cannot be read: {first_line}") from error


def _load_image_encoder(path: Path, dtype: torch.dtype, device: str | torch.device) -> Any:
    from diffsynth.models.wan_video_image_encoder import WanImageEncoder
    from diffsynth.utils.state_dict_converters.wan_video_image_encoder import (
        WanImageEncoderStateDictConverter,
    )

    return _load(WanImageEncoder, [path], dtype, device, WanImageEncoderStateDictConverter)
