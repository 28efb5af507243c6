"""Small random checkpoints in the layouts in which CLIP, HPS v2, aesthetic predictors and DINOv2 are published.

Each function returns the transformers model (or the plain PyTorch modules) that it wrote, for comparison.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

IMAGE_SIZE = 28
TOKENS = 16
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_MERGES = (("a", "t</w>"), ("c", "at</w>"), ("e", "r"), ("er", "s"), ("p", "ers"), ("o", "n</w>"), ("pers", "on</w>"))


def write_clip(folder: Path, seed: int = 0, dim: int = 24) -> CLIPModel:
    """Write a folder in the layout of OpenAI's CLIP for transformers: weights, preprocessing, tokenizer."""
    model = CLIPModel(_clip_config(width=32, text_width=32, heads=2, dim=dim, activation="quick_gelu"))
    _randomise(model, seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    values = {
        "crop_size": IMAGE_SIZE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
        "size": IMAGE_SIZE,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return model


def write_tokenizer(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` like those of CLIP: bytes, bytes that end a word, merges, start and end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(_vocabulary())}))
    merges = ["#version: 0.2", *(" ".join(merge) for merge in _MERGES)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")


def write_hpsv2(file: Path, seed: int = 0) -> CLIPModel:
    """Write a file in the layout of HPS v2, a ViT-H/14 with open_clip's names, and a tokenizer next to it.

    Heads, patch size and the ratio of the widths are those of the original; widths, image size and depth are smaller.
    """
    model = CLIPModel(_clip_config(width=80, text_width=64, heads=16, dim=64, activation="gelu", patch=14))
    _randomise(model, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 1, "name": "HPSv2", "state_dict": open_clip_state(model)}, file)
    write_tokenizer(file.parent)
    return model


def open_clip_state(model: CLIPModel) -> dict[str, Tensor]:
    """Return the weights of a transformers model, with the names of open_clip's `CLIP`."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    vision, text = "vision_model", "text_model"
    renamed = {
        "logit_scale": state["logit_scale"],
        "visual.class_embedding": state[f"{vision}.embeddings.class_embedding"],
        "visual.conv1.weight": state[f"{vision}.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state[f"{vision}.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "token_embedding.weight": state[f"{text}.embeddings.token_embedding.weight"],
        "positional_embedding": state[f"{text}.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
    }
    norms = {
        "visual.ln_pre": f"{vision}.pre_layrnorm",
        "visual.ln_post": f"{vision}.post_layernorm",
        "ln_final": f"{text}.final_layer_norm",
    }
    renamed |= {f"{own}.{part}": state[f"{name}.{part}"] for own, name in norms.items() for part in ("weight", "bias")}
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for blocks, tower in (("visual.transformer.resblocks", vision), ("transformer.resblocks", text)):
        for number in range(2):
            block, layer = f"{blocks}.{number}", f"{tower}.encoder.layers.{number}"
            for kind in ("weight", "bias"):
                qkv = [state[f"{layer}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
                renamed[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
                renamed |= {f"{block}.{own}.{kind}": state[f"{layer}.{name}.{kind}"] for own, name in parts.items()}
    return renamed


def write_aesthetic(file: Path, seed: int = 0, dim: int = 24) -> nn.Sequential:
    """Write a predictor in the layout of improved-aesthetic-predictor, with names that begin with `layers.`.

    Args:
        file: the file to write.
        seed: the seed of the weights.
        dim: the size of CLIP's embeddings; that of `write_clip` by default.
    """
    layers = nn.Sequential(
        nn.Linear(dim, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layers.parameters():
            spread = parameter.shape[-1] ** -0.5
            parameter.copy_(2 * spread * torch.randn(parameter.shape, generator=generator))
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}, file)
    return layers


def write_dinov2(folder: Path, seed: int = 0) -> Dinov2Model:
    """Write a folder in the layout of DINOv2 for transformers, with position embeddings for larger pictures."""
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14, mlp_ratio=2
    )
    model = Dinov2Model(config)
    _randomise(model, seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    values = {
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return model


def _vocabulary() -> list[str]:
    letters = sorted(ByteLevel.alphabet())
    words = [f"{letter}</w>" for letter in letters]
    return [*letters, *words, *("".join(merge) for merge in _MERGES), "<|startoftext|>", "<|endoftext|>"]


def _clip_config(width: int, text_width: int, heads: int, dim: int, activation: str, patch: int = 7) -> CLIPConfig:
    vocabulary = len(_vocabulary())
    common: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": heads, "hidden_act": activation}
    text = {
        **common,
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "vocab_size": vocabulary,
        "max_position_embeddings": TOKENS,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    vision = {
        **common,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "image_size": IMAGE_SIZE,
        "patch_size": patch,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)


@torch.no_grad()
def _randomise(model: nn.Module, seed: int) -> None:
    """Set weights with which the outputs depend on the input as much as those of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name == "logit_scale":
            parameter.fill_(4.6052)
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.1 * values)
        elif parameter.ndim > 1:
            parameter.copy_(1.5 * parameter[0].numel() ** -0.5 * values)
        else:
            parameter.copy_(0.1 * values)
    model.eval()
