"""Where the parts of a Wan model lie: the embedded tiny ones, or a folder in the official layout."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frostline.errors import ConfigError

_TINY = Path(__file__).parent / "tiny" / "weights"
_TOKENIZER = Path("google") / "umt5-xxl"
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
    config = read_config(folder)
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


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must be a mapping of settings")
    return config
