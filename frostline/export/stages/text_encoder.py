"""`text_encoder`: token ids and mask (B, L) to context (B, L, text_dim)."""

from __future__ import annotations

import torch
from torch import Tensor

from frostline.models.text import TextEncoder, tokenize
from frostline.runtime.stage import Network, Stage, TensorSpec

from .inputs import StageInputs, single_network_stage, tolerance

_PROMPTS = ("a person talks and smiles", "a person nods")


def build(inputs: StageInputs) -> Stage:
    """The stage; L is fixed by the tokenizer, which pads."""
    components = inputs.components
    vocabulary = components.text_encoder.token_embedding.num_embeddings
    shape = (inputs.shapes.dimension("batch"), components.text_length)

    def random_ids(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randint(0, vocabulary, shape, generator=generator)

    def random_mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        return (torch.arange(shape[1]) < lengths).long()

    def sample() -> dict[str, Tensor]:
        ids, mask = tokenize(components.tokenizer, _PROMPTS)
        return {"ids": ids.to(inputs.device), "mask": mask.to(inputs.device)}

    network = Network(
        "text_encoder",
        TextEncoder(components.text_encoder).eval(),
        (TensorSpec("ids", shape, torch.int64, random_ids), TensorSpec("mask", shape, torch.int64, random_mask)),
        ("context",),
    )
    weights = components.weights.get("text_encoder")
    return single_network_stage(network, components.name, tolerance("text_encoder", inputs.dtype), sample, weights)
