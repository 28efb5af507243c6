"""The stage `image_encoder`: first frame (B, 3, H, W) in [-1, 1] to CLIP feature (B, 257, 1280)."""

from __future__ import annotations

from frostline.models.wan.image import ImageEncoder
from frostline.runtime.stage import Network, Stage, TensorSpec
from frostline.stages.tolerances import tolerance

from .inputs import StageInputs


def build(inputs: StageInputs) -> Stage | None:
    """Return the stage, for models that have an image encoder."""
    components = inputs.components
    encoder = components.image_encoder
    if encoder is None:
        return None
    shape = (inputs.shapes.dimension("batch"), 3, inputs.pixels("height"), inputs.pixels("width"))
    module = ImageEncoder(encoder).to(components.device, components.dtype).eval()
    network = Network("image_encoder", module, (TensorSpec("image", shape, components.dtype),), ("clip_feature",))
    return Stage(
        name="image_encoder",
        model=components.name,
        description="Encode the first frame, RGB in [-1, 1], to the CLIP feature of the denoiser.",
        license=components.license,
        networks=(network,),
        tolerance=tolerance(components.dtype),
        weights=components.weights.get("image_encoder"),
    )
