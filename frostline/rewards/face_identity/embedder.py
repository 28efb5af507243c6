"""The stage `face_embedder`: aligned faces (N, 3, S, S) in [-1, 1] to unit-norm embeddings (N, D)."""

from __future__ import annotations

from typing import cast

from torch import nn

from frostline.models.faces.embedders import FaceEmbedder
from frostline.rewards.face_identity.fp32_edges import weights_dtype, with_fp32_edges
from frostline.runtime.stage import Network, Stage, TensorSpec
from frostline.stages.shapes import ShapeRange
from frostline.stages.tolerances import tolerance


def build(module: nn.Module, shapes: ShapeRange) -> Stage:
    """Return the stage of the frozen uses: reference faces and scoring.

    Args:
        module: the return value of `load_embedder`.
    """
    embedder = cast(FaceEmbedder, module)
    side = embedder.image_size
    faces = TensorSpec("faces", (shapes.dimension("faces"), 3, side, side))
    network = Network("face_embedder", with_fp32_edges(module), (faces,), ("embeddings",))
    return Stage(
        name="face_embedder",
        model=embedder.name,
        description=("Embed aligned faces, RGB in [-1, 1], as unit vectors: their dot product measures similarity."),
        license=getattr(module, "license", None),
        networks=(network,),
        tolerance=tolerance(weights_dtype(module)),
    )
