"""`face_detector`: uint8 frames (N, 3, H, W) to all faces in them, by the three networks of MTCNN."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from frostline.models.faces.detections import quantize_frames
from frostline.models.faces.mtcnn import MTCNN_INPUT_SIZES, MTCNN_OUTPUTS, BatchedMTCNN, as_network
from frostline.models.tiny.clips import held_out_clips
from frostline.runtime.stage import Dimension, Network, Runner, Stage, TensorSpec

from .face_networks import contiguous_copy, weights_dtype, with_fp32_edges
from .inputs import StageInputs, tolerance


def build(inputs: StageInputs) -> Stage:
    """The stage; its outputs are the tensors of `Detections`."""
    modules = {name: with_fp32_edges(module) for name, module in inputs.faces.detector_networks.items()}

    def assemble(runners: Mapping[str, Callable[..., Mapping[str, Tensor]]]) -> Runner:
        detector = BatchedMTCNN(runners, **inputs.faces.detector_settings)

        def detect(**tensors: Tensor) -> dict[str, Tensor]:
            found = detector.detect(tensors["frames"])
            return {
                "boxes": found.boxes,
                "probabilities": found.probabilities,
                "landmarks": found.landmarks,
                "frame_index": found.frame_index,
            }

        return detect

    def sample() -> dict[str, Tensor]:
        clips = held_out_clips(2, seed=0)
        return {"frames": quantize_frames(clips.video.flatten(0, 1)).to(inputs.device)}

    return Stage(
        name="face_detector",
        model="mtcnn",
        networks=tuple(_network(name, module, inputs) for name, module in modules.items()),
        torch=assemble({name: as_network(module, MTCNN_OUTPUTS[name]) for name, module in modules.items()}),
        assemble=assemble,
        sample=sample,
        tolerance=tolerance("face_detector", weights_dtype(inputs.faces.detector_networks["pnet"])),
    )


def _network(name: str, module: nn.Module, inputs: StageInputs) -> Network:
    shapes, side = inputs.shapes, MTCNN_INPUT_SIZES[name]
    free = (_odd(shapes.dimension("face_height")), _odd(shapes.dimension("face_width")))
    size = free if side is None else (side, side)
    images = TensorSpec("images", (shapes.dimension("faces"), 3, *size))
    return Network(name, contiguous_copy(module), (images,), MTCNN_OUTPUTS[name])


def _odd(dimension: Dimension) -> Dimension:
    """With an odd typical extent: from an even one AOTInductor infers that all are, and pools odd ones wrongly."""
    return replace(dimension, opt=min((dimension.opt - 1) | 1, dimension.max))
