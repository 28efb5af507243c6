"""The stage `text_encoder`: token ids and mask (B, L) to context (B, L, text_dim)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.models.wan.components import WanComponents
from frostline.models.wan.text import TextEncoder, tokenize
from frostline.runtime.stage import Case, Network, Stage, TensorSpec
from frostline.stages.tolerances import tolerance

from .inputs import StageInputs

_PROMPTS = ("a person talks and smiles", "a person nods")


@dataclass(frozen=True, kw_only=True)
class TextEncoderStage(Stage):
    """A stage with one network, whose samples are real prompts."""

    components: WanComponents

    def cases(self) -> Mapping[str, Case]:
        """Return the tokens of two prompts."""
        ids, mask = tokenize(self.components.tokenizer, _PROMPTS)
        device = self.networks[0].device
        return {"sample": Case({"ids": ids.to(device), "mask": mask.to(device)})}


def build(inputs: StageInputs) -> Stage:
    """Return the stage. L is fixed, because the tokenizer pads."""
    components = inputs.components
    vocabulary = components.text_encoder.token_embedding.num_embeddings
    shape = (inputs.shapes.dimension("batch"), components.text_length)

    def random_ids(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randint(0, vocabulary, shape, generator=generator)

    def random_mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        return (torch.arange(shape[1]) < lengths).long()

    network = Network(
        "text_encoder",
        TextEncoder(components.text_encoder).eval(),
        (TensorSpec("ids", shape, torch.int64, random_ids), TensorSpec("mask", shape, torch.int64, random_mask)),
        ("context",),
    )
    return TextEncoderStage(
        name="text_encoder",
        model=components.name,
        description=(
            "Encode prompts: token ids and attention mask, each (batch, text_length), to the context of the denoiser."
        ),
        license=components.license,
        networks=(network,),
        tolerance=tolerance(components.dtype),
        weights=components.weights.get("text_encoder"),
        components=components,
    )
