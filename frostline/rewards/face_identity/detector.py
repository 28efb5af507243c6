"""The stage `face_detector`: it finds all faces in uint8 frames (N, 3, H, W) with the networks of one detector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from frostline.models.faces.detectors import DetectorModel, DetectorNetwork
from frostline.rewards.face_identity.fp32_edges import weights_dtype, with_fp32_edges
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.stage import Case, Network, Runner, Stage, Tensors, TensorSpec, in_torch
from frostline.stages.shapes import ShapeRange
from frostline.stages.tolerances import tolerance

# The content of `faces.png`, from top to bottom: two clips of the built-in model's renderer, three frames each.
_FRAMES = 6
# The networks are shallow, and their probabilities are compared with thresholds.
_FP32_TOLERANCE = Tolerance(atol=1e-5, rtol=1e-5, cosine=0.999999)


@dataclass(frozen=True, kw_only=True)
class FaceDetectorStage(Stage):
    """The networks of a detector; the computations between them run in torch."""

    detector: DetectorModel

    def torch(self, inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        """Detect with all networks in PyTorch."""
        return self.run({network.name: in_torch(network) for network in self.networks}, inputs)

    def run(self, on: Mapping[str, Runner], inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        """Detect with the networks in `on`, by name; the outputs are the tensors of `Detections`."""
        found = self.detector.make(on).detect(inputs["frames"])
        return {
            "boxes": found.boxes,
            "probabilities": found.probabilities,
            "landmarks": found.landmarks,
            "frame_index": found.frame_index,
        }

    def cases(self) -> Mapping[str, Case]:
        """Return frames that contain faces."""
        with resources.files("frostline.rewards.face_identity").joinpath("faces.png").open("rb") as file:
            strip = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
        frames = strip.permute(2, 0, 1).unflatten(1, (_FRAMES, -1)).movedim(1, 0).contiguous()
        return {"sample": Case({"frames": frames.to(self.networks[0].device)})}


def detector_tolerance(dtype: torch.dtype) -> Tolerance:
    """Return the tolerance of a detector's engines for weights of `dtype`."""
    return _FP32_TOLERANCE if dtype == torch.float32 else tolerance(dtype)


def build(detector: DetectorModel, shapes: ShapeRange) -> Stage:
    """Return the stage."""
    networks = {name: replace(n, module=with_fp32_edges(n.module)) for name, n in detector.networks.items()}
    weight = next(iter(detector.networks.values())).module
    return FaceDetectorStage(
        name="face_detector",
        model=detector.name,
        description="Find faces in images: the networks of the detector; their outputs are decoded outside "
        "of the engine.",
        license=detector.license,
        networks=tuple(_network(name, network, shapes) for name, network in networks.items()),
        tolerance=detector_tolerance(weights_dtype(weight)),
        detector=detector,
    )


def _network(name: str, network: DetectorNetwork, shapes: ShapeRange) -> Network:
    size: tuple[int | Dimension, int | Dimension]
    if network.side is not None:
        size = (network.side, network.side)
    else:
        size = (_side(shapes, "face_height", network.multiple), _side(shapes, "face_width", network.multiple))
    images = TensorSpec("images", (shapes.dimension("faces"), 3, *size))
    return Network(name, network.module, (images,), network.outputs)


def _side(shapes: ShapeRange, name: str, multiple: int) -> Dimension:
    """Return the dynamic dimension of a side of images, with sizes rounded up to multiples of `multiple`."""
    pixels = shapes.dimension(name)
    if multiple > 1:
        low, typical, high = (-(-extent // multiple) for extent in (pixels.min, pixels.opt, pixels.max))
        return Dimension(name, low, typical, high, multiple, multiple)
    # With an odd typical value: from an even one, AOTInductor infers that all are even, and pools odd ones wrongly.
    odd = (extent for extent in ((pixels.opt - 1) | 1, pixels.opt | 1) if pixels.min <= extent <= pixels.max)
    return replace(pixels, opt=next(odd, pixels.opt))
