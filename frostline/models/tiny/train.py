"""Train the built-in tiny models from scratch: `python -m frostline.models.tiny.train`.

Phases: `autoencoder`, `decoder` (the VAE), `denoiser` (with the text encoder), `drift` (fine-tuning on the clips with
the largest drift), `high_noise` (for tiny-moe) and `ti2v` (fixed first frame). Each phase is seeded, shows progress,
and resumes from its last checkpoint in `--work`. The weights are written to `--out` in the layout of the official Wan
checkpoints. Parts in `--keep` are not trained.

The denoiser in the repository was trained with these options (its loss curve is in benchmarks/NOTES.md):
    --keep vae text high_noise ti2v --clips 384 --denoiser-steps 3000 --drift-steps 600
The parts in `--keep` were trained earlier, on clips without drift.
"""

import argparse
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer, WanTextEncoder
from diffsynth.models.wan_video_vae import VideoVAE_, WanVideoVAE
from safetensors.torch import load_file, save_file
from torch import nn

from . import architecture
from .clips import PROMPTS
from .tokenizer import write_tokenizer
from .train_denoiser import Pool, encode_pool, train_denoiser
from .train_vae import build_vae, to_official_latents, train_autoencoder, train_decoder

_BOUNDARY = 0.9
# The minimum drift of the clips in the phase `drift`, and its peak learning rate.
_DRIFTING, _DRIFT_RATE = 0.8, 7e-4
_Model = TypeVar("_Model", bound=nn.Module)
_KEEPABLE = ("vae", "text", "high_noise", "ti2v")


def main() -> None:
    """Run all phases, then write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoint folder (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "weights", help="weights folder (default: %(default)s)"
    )
    parser.add_argument(
        "--keep", nargs="*", default=[], choices=_KEEPABLE, help="parts in --out that are not trained (default: none)"
    )
    parser.add_argument("--autoencoder-steps", type=int, default=2600)
    parser.add_argument("--decoder-steps", type=int, default=300)
    parser.add_argument("--denoiser-steps", type=int, default=3000)
    parser.add_argument("--drift-steps", type=int, default=600)
    parser.add_argument("--expert-steps", type=int, default=150)
    parser.add_argument(
        "--clips", type=int, default=384, help="number of clips to encode for the denoisers (default: %(default)s)"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)

    keep = arguments.keep
    tiny = arguments.out / "tiny"
    vae_file, text_file = tiny / "Wan2.1_VAE.safetensors", tiny / "models_t5_umt5-xxl-enc.safetensors"
    if "vae" in keep:
        vae = WanVideoVAE()
        vae.model = _load_model(VideoVAE_(**architecture.VAE), vae_file)
    else:
        vae = _train_vae(arguments)
        _save_model(vae_file, vae.model)
    write_tokenizer(tiny / "google" / "umt5-xxl", PROMPTS)
    _write_config(tiny, architecture.DENOISER, "i2v", _WHOLE_MODEL)

    tokenizer = HuggingfaceTokenizer(
        str(tiny / "google" / "umt5-xxl"), seq_len=architecture.TEXT_LENGTH, clean="whitespace"
    )
    torch.manual_seed(0)
    text = WanTextEncoder(**architecture.TEXT_ENCODER)
    if "text" in keep:
        _load_model(text, text_file)
    pool = encode_pool(vae, arguments.clips, arguments.work)

    def denoiser(name: str, settings: dict[str, Any], steps: int, clips: Pool = pool, **options: Any) -> WanModel:
        return train_denoiser(name, settings, text, tokenizer, clips, steps, arguments.work, **options)

    base = denoiser("denoiser", architecture.DENOISER, arguments.denoiser_steps, train_text="text" not in keep)
    drifting = pool.drifting(_DRIFTING)
    base = denoiser(
        *("drift", architecture.DENOISER, arguments.drift_steps, drifting), start=base, learning_rate=_DRIFT_RATE
    )
    _save_model(tiny / "diffusion_pytorch_model.safetensors", base)
    if "text" not in keep:
        _save_model(text_file, text)

    if "high_noise" not in keep:
        expert = denoiser("high_noise", architecture.EXPERT, arguments.expert_steps, sigma_range=(_BOUNDARY, 1.0))
        folder = arguments.out / "tiny-moe" / "high_noise_model"
        _save_model(folder / "diffusion_pytorch_model.safetensors", expert)
        _write_config(folder, architecture.EXPERT, "i2v", {})

    if "ti2v" not in keep:
        pinned = denoiser("ti2v", architecture.TI2V, arguments.expert_steps)
        folder = arguments.out / "tiny-ti2v"
        _save_model(folder / "diffusion_pytorch_model.safetensors", pinned)
        _write_config(folder, architecture.TI2V, "ti2v", {})


_WHOLE_MODEL = {
    "vae": architecture.VAE,
    "text_encoder": architecture.TEXT_ENCODER,
    "text_len": architecture.TEXT_LENGTH,
    "boundary": _BOUNDARY,
}


def _train_vae(arguments: argparse.Namespace) -> WanVideoVAE:
    torch.manual_seed(0)
    model: VideoVAE_ = build_vae()
    train_autoencoder(model, arguments.autoencoder_steps, arguments.work)
    train_decoder(model, arguments.decoder_steps, arguments.work)
    to_official_latents(model)
    vae = WanVideoVAE()
    vae.model = model.eval().requires_grad_(False)
    return vae


def _load_model(model: _Model, path: Path) -> _Model:
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model.eval().requires_grad_(False)


def _save_model(path: Path, model: nn.Module) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _write_config(folder: Path, denoiser: dict[str, Any], model_type: str, others: dict[str, Any]) -> None:
    """Write a `config.json` in the format of Wan; `others` are the settings that differ from the official models."""
    keys = ("dim", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "eps")
    config = {"_class_name": "WanModel", "model_type": model_type, **{key: denoiser[key] for key in keys}, **others}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
