"""Stages of vision rewards: an image network on preprocessed images, and CLIP's text tower on tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from frostline.models.vision.clip import Clip, TextTower
from frostline.runtime.stage import Case, Network, Stage, TensorSpec
from frostline.stages.shapes import ShapeRange
from frostline.stages.tolerances import tolerance

_PROMPTS = ("a person talks and smiles", "two cats", "")


class ImageNetwork(Protocol):
    """An `nn.Module` that maps preprocessed images (N, 3, S, S) to features (N, D), both float32.

    Attributes:
        image_size: the side S in pixels.
    """

    image_size: int

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class TextStage(Stage):
    """The stage of a text tower, whose sample inputs are tokens of real prompts."""

    clip: Clip

    def cases(self) -> Mapping[str, Case]:
        """Return the tokens of three prompts, one of them empty."""
        return {"sample": Case({"tokens": self.clip.tokens(_PROMPTS).to(self.networks[0].device)})}


def image_stage(name: str, module: nn.Module, description: str, license: str | None, shapes: ShapeRange) -> Stage:
    """Return the stage of the frozen uses of an `ImageNetwork`: references and scoring."""
    side = cast(ImageNetwork, module).image_size
    images = TensorSpec("images", (shapes.dimension("images"), 3, side, side))
    network = Network(name, module, (images,), ("features",))
    return Stage(
        name=name,
        model=name.removesuffix("_image"),
        description=description,
        license=license,
        networks=(network,),
        tolerance=tolerance(network.weight.dtype),
    )


def text_stage(name: str, clip: Clip, license: str | None, shapes: ShapeRange) -> Stage:
    """Return the stage of the text tower of `clip`."""
    tower = clip.text
    tokens = TensorSpec(
        "tokens", (shapes.dimension("batch"), tower.length), torch.int64, partial(_random_tokens, tower)
    )
    network = Network(name, tower, (tokens,), ("features",))
    return TextStage(
        name=name,
        model=name.removesuffix("_text"),
        description="Encode prompts: tokens (batch, length) to unit vectors; the dot product with a "
        "picture's vector measures how well they match.",
        license=license,
        networks=(network,),
        tolerance=tolerance(network.weight.dtype),
        clip=clip,
    )


def _random_tokens(tower: TextTower, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return random int64 tokens of texts with random lengths, each with the end token that the tower expects."""
    end = tower.vocabulary - 1 if tower.end is None else tower.end
    tokens = torch.randint(0, min(end, tower.vocabulary - 1), shape, generator=generator)
    ends = torch.randint(1, shape[1], (shape[0], 1), generator=generator)
    return tokens.scatter(1, ends, end)
