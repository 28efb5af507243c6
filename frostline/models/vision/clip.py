"""CLIP (Radford et al. 2021, arXiv:2103.00020): images and texts as unit vectors in one space.

The towers are equivalent to `transformers.CLIPModel`, with its layers and weights. For weights of any floating-point
type, pixels and vectors are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.errors import ConfigError

from .folders import load_pretrained
from .preparation import PREPARATION_FILE, Preparation

if TYPE_CHECKING:
    from transformers import CLIPModel

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


class ImageTower(nn.Module):
    """Map prepared images to unit vectors; differentiable with respect to the pixels.

    Attributes:
        image_size: S, side of its input in pixels.
        dim: D.
    """

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        vision, config = _any(model.vision_model), _any(model.config)
        self.embeddings, self.first_norm = vision.embeddings, vision.pre_layrnorm
        self.layers, self.last_norm = vision.encoder.layers, vision.post_layernorm
        self.projection = model.visual_projection
        self.image_size = int(config.vision_config.image_size)
        self.dim = int(config.projection_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, S, S) to (N, D)."""
        x = self.first_norm(self.embeddings(pixels.to(self.projection.weight.dtype)))
        for layer in self.layers:
            x = _first(layer(x, attention_mask=None))
        return F.normalize(self.projection(self.last_norm(x[:, 0])).float(), dim=1)


class TextTower(nn.Module):
    """Map tokens to unit vectors.

    Attributes:
        length: L, number of tokens.
        dim: D.
    """

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        text, config = _any(model.text_model), _any(model.config.text_config)
        self.embeddings, self.layers, self.norm = text.embeddings, text.encoder.layers, text.final_layer_norm
        self.projection = model.text_projection
        self.length = int(config.max_position_embeddings)
        self.vocabulary = int(config.vocab_size)
        self.dim = int(_any(model.config).projection_dim)
        # In configurations from before transformers 4.31, the value 2 means that the largest token id ends the text.
        self.end = None if config.eos_token_id == 2 else int(config.eos_token_id)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (N, L) int64 to (N, D), the output at the end of the text."""
        x = self.embeddings(input_ids=tokens)
        mask = torch.full((self.length, self.length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)[None, None]
        for layer in self.layers:
            x = _first(layer(x, attention_mask=mask))
        ends = (tokens if self.end is None else (tokens == self.end).int()).argmax(dim=1)
        x = self.norm(x).gather(1, ends[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
        return F.normalize(self.projection(x).float(), dim=1)


@dataclass(frozen=True, eq=False)
class Clip:
    """A loaded model.

    Attributes:
        scale: factor that converts the cosine similarity of an image and a text to the published score of the model.
        prepare: converts frames (N, 3, H, W) in [0, 1] to the input of the image tower.
        tokenizer: a tokenizer of transformers.
        processor_files: the files of `prepare` and `tokenizer`.
        clean: applied to texts before `tokenizer`.
    """

    image: ImageTower
    text: TextTower
    scale: float
    prepare: Callable[[Tensor], Tensor]
    tokenizer: Any
    processor_files: tuple[Path, ...]
    clean: Callable[[str], str] | None = None

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return (N, L) int64 tokens, truncated and padded to L; the padding value has no effect, as texts end before
        it.
        """
        cleaned = [self.clean(text) if self.clean else text for text in texts]
        padded = self.tokenizer(cleaned, padding="max_length", max_length=self.text.length, truncation=True)
        return torch.tensor(padded["input_ids"])


def load_clip(folder: Path, processor: Path | None = None) -> Clip:
    """Load a folder written by `CLIPModel.save_pretrained`, in float32; the score is the model's logit.

    Args:
        processor: folder with `preprocessor_config.json` and the tokenizer's files; `folder` if None.
    Raises:
        ConfigError: files are missing or belong to another model.
    """
    from transformers import CLIPModel

    model = load_pretrained(CLIPModel, folder)
    processor = processor or folder
    tokenizer = load_tokenizer(processor, model.config.text_config.vocab_size)
    files = (processor / PREPARATION_FILE, *tokenizer_files(processor))
    scale = float(model.logit_scale.detach().exp())
    return Clip(ImageTower(model), TextTower(model), scale, Preparation.read(processor), tokenizer, files)


def load_tokenizer(folder: Path, vocabulary: int) -> Any:
    """Load CLIP's tokenizer from `vocab.json` and `merges.txt`, or from `tokenizer.json`.

    Args:
        vocabulary: size of the model's vocabulary.
    Raises:
        ConfigError: files are missing, damaged or belong to another tokenizer.
    """
    from transformers import CLIPTokenizer

    if not tokenizer_files(folder):
        raise ConfigError(f"{folder}: has no tokenizer; a CLIP folder contains vocab.json and merges.txt")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many types of exceptions
        raise ConfigError(f"{folder}: has no CLIP tokenizer: {error}") from error
    if len(tokenizer) != vocabulary:
        raise ConfigError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, but the model has {vocabulary}: use the model's own "
            "tokenizer"
        )
    return tokenizer


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Return the existing files of a tokenizer; none if the vocabulary is missing."""
    found = tuple(path for name in _TOKENIZER_FILES if (path := folder / name).is_file())
    names = {path.name for path in found}
    return found if "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names else ()


def _any(part: Any) -> Any:
    """Return the argument with type Any, because transformers' annotations are too wide."""
    return part


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
