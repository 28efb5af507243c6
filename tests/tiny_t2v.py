"""The built-in model without a first frame: its denoiser has no channels for the image."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from frostline.models.checkpoints import loading

TINY = Path(loading.__file__).parents[1] / "tiny" / "weights" / "tiny"
_DENOISER, _INPUT = "diffusion_pytorch_model.safetensors", "patch_embedding.weight"


def write_tiny_t2v(folder: Path) -> Path:
    """Write a text-to-video model with 16 latent channels; return its folder."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t2v", "in_dim": 16}))
    tensors = load_file(folder / _DENOISER)
    (name,) = (name for name in tensors if name.endswith(_INPUT))
    tensors[name] = tensors[name][:, :16].contiguous()
    (folder / _DENOISER).unlink()
    save_file(tensors, folder / _DENOISER)
    return folder
