"""HPS v2 (Wu et al. 2023, arXiv:2306.09341): a ViT-H/14 of open_clip, trained on human preferences.

It is published as one file with open_clip's names. open_clip stores queries, keys and values in one matrix, and its
projections transposed; otherwise the network is equivalent to `transformers.CLIPModel`.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.checkpoints.formats.tensor_files import open_tensors, reading

from .clip import Clip, ImageTower, TextTower, load_tokenizer, tokenizer_files
from .folders import from_transformers
from .letterbox import Letterbox

# The number of attention heads, which tensors do not show. open_clip models with another number also have widths in
# another proportion (`_PROPORTIONS`), and are rejected.
_HEADS = 16
_PROPORTIONS = (5, 4)
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_TOWERS = {"visual.transformer.resblocks": "vision_model", "transformer.resblocks": "text_model"}
_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IN_BLOCK = re.compile(r"(?P<tower>.*resblocks)\.(?P<number>\d+)\.(?P<part>.+?)[._](?P<kind>weight|bias)")


def load_hpsv2(file: Path, processor: Path) -> Clip:
    """Load `HPS_v2_compressed.pt`, `HPS_v2.1_compressed.pt` or the same tensors in a .safetensors file, in float32.

    The score is the cosine similarity itself, as in HPSv2's own script.

    Args:
        processor: folder with the files of CLIP's tokenizer, which open_clip's ViT-H/14 also uses.
    Raises:
        ConfigError: a file is missing, or has other tensors than those of HPS v2.
    """
    model = _build(read_open_clip(file), file)
    image = ImageTower(model)
    tokenizer = load_tokenizer(processor, model.config.text_config.vocab_size)
    prepare = Letterbox(image.image_size, _MEAN, _STD)
    return Clip(image, TextTower(model), 1.0, prepare, tokenizer, tokenizer_files(processor), clean_text)


def read_open_clip(file: Path) -> dict[str, Tensor]:
    """Read a checkpoint of open_clip: tensors by name, at the top level or in `state_dict`.

    Raises:
        ConfigError: the file cannot be read, or has no named tensors.
    """
    if file.suffix == ".safetensors":
        return dict(open_tensors([file], "cpu"))
    with reading([file]):
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
        content = content.get("state_dict", content) if isinstance(content, dict) else content
        if not isinstance(content, dict):
            raise ValueError("it has no named tensors")
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of open_clip's `CLIP` to those of `transformers.CLIPModel`; unknown names are unchanged."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, _, kind = name.rpartition(".")
        block = _IN_BLOCK.fullmatch(name)
        if name in _NAMES:
            renamed[_NAMES[name]] = tensor
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T.contiguous()
        elif owner in _NORMS:
            renamed[f"{_NORMS[owner]}.{kind}"] = tensor
        elif block and block["tower"] in _TOWERS:
            layer = f"{_TOWERS[block['tower']]}.encoder.layers.{block['number']}"
            if block["part"] == "attn.in_proj":
                for which, part in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{which}_proj.{block['kind']}"] = part.contiguous()
            else:
                renamed[f"{layer}.{_PARTS.get(block['part'], block['part'])}.{block['kind']}"] = tensor
        else:
            renamed[name] = tensor
    return renamed


def clean_text(text: str) -> str:
    """Repair wrongly decoded characters and HTML entities, as open_clip's tokenizer does."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _build(tensors: Mapping[str, Tensor], file: Path) -> Any:
    """Build the model, checking that all tensors of the file are used and all tensors of the model are loaded."""
    from transformers import CLIPConfig, CLIPModel

    try:
        config = CLIPConfig(**_settings(tensors))
    except KeyError as error:
        raise ConfigError(f"{file}: is not a checkpoint of HPS v2: it has no tensor {error}") from None
    except (IndexError, ValueError) as error:
        raise ConfigError(f"{file}: is not a checkpoint of HPS v2: {error}") from None
    state = to_transformers(tensors)
    return from_transformers(CLIPModel, None, str(file), every_tensor=True, config=config, state_dict=state)


def _settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of `transformers.CLIPConfig` from the shapes of tensors."""
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    dim = tensors["text_projection"].shape[1]
    if width * _PROPORTIONS[1] != text_width * _PROPORTIONS[0] or dim != text_width or text_width % _HEADS:
        raise ValueError(f"widths of {width}, {text_width} and {dim} are not those of a ViT-H/14")
    patches = tensors["visual.positional_embedding"].shape[0] - 1
    vision, text = (
        _tower_settings(tensors, blocks, own) for blocks, own in zip(_TOWERS, (width, text_width), strict=True)
    )
    vision |= {"image_size": patch * math.isqrt(patches), "patch_size": patch}
    length = tensors["positional_embedding"].shape[0]
    text |= {"vocab_size": vocabulary, "max_position_embeddings": length, "eos_token_id": vocabulary - 1}
    return {"vision_config": vision, "text_config": text, "projection_dim": dim}


def _tower_settings(tensors: Mapping[str, Tensor], blocks: str, width: int) -> dict[str, Any]:
    numbers = {block["number"] for name in tensors if (block := _IN_BLOCK.fullmatch(name)) and block["tower"] == blocks}
    return {
        "hidden_size": width,
        "intermediate_size": tensors[f"{blocks}.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": len(numbers),
        "num_attention_heads": _HEADS,
        "hidden_act": "gelu",
    }
