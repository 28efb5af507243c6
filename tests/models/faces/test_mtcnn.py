"""BatchedMTCNN compared with facenet-pytorch's own MTCNN, frame by frame."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from facenet_pytorch import MTCNN
from torch import Tensor, nn

from frostline.errors import DataError
from frostline.models.faces import (
    MTCNN_INPUT_SIZES,
    MTCNN_OUTPUTS,
    BatchedMTCNN,
    Detections,
    as_network,
    load_mtcnn_networks,
    mtcnn,
    quantize_frames,
    upscale_frames,
)
from frostline.models.faces.alignment import scaled_template


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return load_mtcnn_networks()


@pytest.fixture(scope="module")
def detector(networks: dict[str, nn.Module]) -> BatchedMTCNN:
    return BatchedMTCNN({name: as_network(module, MTCNN_OUTPUTS[name]) for name, module in networks.items()})


@pytest.fixture(scope="module")
def facenet() -> MTCNN:
    return MTCNN(keep_all=True)


def facenet_detect(facenet: MTCNN, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (K, 4), probabilities (K,) and landmarks (K, 5, 2) of one frame, largest face first."""
    found = facenet.detect(frame.permute(1, 2, 0).numpy(), landmarks=True)
    if found[0] is None:
        return torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 5, 2)
    boxes, probabilities, landmarks = (torch.tensor(np.array(x, dtype=np.float32)) for x in found)
    return boxes, probabilities, landmarks


def of_frame(detections: Detections, frame: int) -> tuple[Tensor, Tensor, Tensor]:
    here = detections.frame_index == frame
    return detections.boxes[here], detections.probabilities[here], detections.landmarks[here]


def assert_same_faces(
    actual: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor], pixels: float = 0.01
) -> None:
    for ours, theirs, tolerance in zip(actual, expected, (pixels, 1e-5, pixels), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("person", ["astronaut", "hopper"])
@pytest.mark.parametrize("size", [64, 96, 160, 240])
def test_equals_facenet_on_every_frame_of_a_clip(
    detector: BatchedMTCNN, facenet: MTCNN, clip: Callable[..., Tensor], size: int, person: str
) -> None:
    frames = clip(size, person=person)
    detections = detector.detect(frames)
    assert size < 96 or len(detections) >= len(frames)
    for t, frame in enumerate(frames):
        assert_same_faces(of_frame(detections, t), facenet_detect(facenet, frame))


def test_equals_facenet_on_every_picture(detector: BatchedMTCNN, facenet: MTCNN, pictures: dict[str, Tensor]) -> None:
    faces = 0
    for picture in pictures.values():
        expected = facenet_detect(facenet, picture)
        assert_same_faces(of_frame(detector.detect(picture[None]), 0), expected)
        faces += len(expected[0])
    assert faces >= 20


def test_equals_facenet_on_a_group_picture(detector: BatchedMTCNN, facenet: MTCNN, group_picture: Tensor) -> None:
    expected = facenet_detect(facenet, group_picture[0])
    assert len(expected[0]) >= 5
    assert_same_faces(of_frame(detector.detect(group_picture), 0), expected)


@pytest.mark.parametrize("settings", [{"min_face_size": 40}, {"thresholds": (0.5, 0.6, 0.6), "factor": 0.6}])
def test_equals_facenet_at_other_settings(
    networks: dict[str, nn.Module], group_picture: Tensor, settings: dict
) -> None:
    served = {name: as_network(module, MTCNN_OUTPUTS[name]) for name, module in networks.items()}
    expected = facenet_detect(MTCNN(keep_all=True, **settings), group_picture[0])
    assert_same_faces(of_frame(BatchedMTCNN(served, **settings).detect(group_picture), 0), expected)


def test_a_frame_alone_is_the_frame_in_a_batch(
    detector: BatchedMTCNN, clip: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = torch.cat([clip(128), torch.full((1, 3, 128, 128), 127, dtype=torch.uint8), clip(128, 3, "hopper")])
    together = detector.detect(frames)
    monkeypatch.setattr(mtcnn, "_PIXELS_AT_ONCE", 3 * 128 * 128)
    monkeypatch.setattr(mtcnn, "_NETWORK_BATCH", 7)
    in_parts = detector.detect(frames)
    assert torch.equal(in_parts.frame_index, together.frame_index)
    for t, frame in enumerate(frames):
        alone = of_frame(detector.detect(frame[None]), 0)
        assert_same_faces(of_frame(together, t), alone, pixels=1e-3)
        assert_same_faces(of_frame(in_parts, t), alone, pixels=1e-3)


def test_largest_face_of_each_frame(detector: BatchedMTCNN, facenet: MTCNN, group_picture: Tensor) -> None:
    frames = torch.cat([torch.zeros_like(group_picture), group_picture, torch.zeros_like(group_picture)])
    largest = detector.detect(frames).largest()
    assert largest.found.tolist() == [False, True, False]
    boxes, probabilities, landmarks = facenet_detect(facenet, group_picture[0])
    biggest = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).argmax()
    torch.testing.assert_close(largest.boxes[1], boxes[biggest], atol=0.01, rtol=0)
    torch.testing.assert_close(largest.landmarks[1], landmarks[biggest], atol=0.01, rtol=0)
    torch.testing.assert_close(largest.probability[1], probabilities[biggest], atol=1e-5, rtol=0)
    assert largest.boxes[0].eq(0).all() and largest.probability[2] == 0
    torch.testing.assert_close(largest.landmarks[0], scaled_template(360, 480).float())
    assert largest.reshape(3, 1).landmarks.shape == (3, 1, 5, 2)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(0, 3, 64, 64, dtype=torch.uint8),
        torch.full((2, 3, 64, 64), 128, dtype=torch.uint8),
        torch.full((2, 3, 19, 300), 128, dtype=torch.uint8),
        torch.zeros(1, 3, 1, 1, dtype=torch.uint8),
        torch.randint(0, 256, (2, 3, 80, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["none", "grey", "flat", "pixel", "noise"],
)
@pytest.mark.parametrize("upscale", [1, 2])
def test_frames_without_a_face(detector: BatchedMTCNN, frames: Tensor, upscale: int) -> None:
    detections = detector.detect(frames, upscale=upscale)
    assert len(detections) == 0
    assert detections.num_frames == len(frames)
    assert detections.frame_size == tuple(frames.shape[-2:])
    largest = detections.largest()
    assert not largest.found.any()
    assert largest.landmarks.shape == (len(frames), 5, 2)


def test_upscaling_reports_original_pixels(detector: BatchedMTCNN, facenet: MTCNN, clip: Callable[..., Tensor]) -> None:
    frames = clip(64)
    detections = detector.detect(frames, upscale=2)
    assert detections.largest().found.all()
    assert detections.frame_size == (64, 64)
    for t, frame in enumerate(upscale_frames(frames, 2)):
        boxes, probabilities, landmarks = facenet_detect(facenet, frame)
        expected = ((boxes + 0.5) / 2 - 0.5, probabilities, (landmarks + 0.5) / 2 - 0.5)
        assert_same_faces(of_frame(detections, t), expected)


@pytest.mark.parametrize("frames", [torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, 3, dtype=torch.uint8)])
def test_wrong_frames_are_refused(detector: BatchedMTCNN, frames: Tensor) -> None:
    with pytest.raises(DataError, match="uint8"):
        detector.detect(frames)


def test_quantize_rounds_and_clamps() -> None:
    frames = torch.tensor([-0.2, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.3])
    assert quantize_frames(frames).tolist() == [0, 0, 0, 1, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantize_frames(levels / 255), levels)


def onnxruntime_network(path: Path, output_names: tuple[str, ...]) -> Callable[..., Mapping[str, Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def network(*, images: Tensor) -> dict[str, Tensor]:
        outputs = session.run(output_names, {"images": images.numpy()})
        return {name: torch.from_numpy(x) for name, x in zip(output_names, outputs, strict=True)}

    return network


def test_networks_run_in_onnxruntime(
    networks: dict[str, nn.Module],
    detector: BatchedMTCNN,
    group_picture: Tensor,
    clip: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    served = {}
    for name, module in networks.items():
        size = MTCNN_INPUT_SIZES[name]
        dynamic = {0: torch.export.Dim.DYNAMIC}
        if size is None:
            dynamic |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        torch.onnx.export(
            module,
            (torch.zeros(2, 3, size or 30, size or 34),),
            tmp_path / f"{name}.onnx",
            input_names=["images"],
            output_names=MTCNN_OUTPUTS[name],
            dynamic_shapes=(dynamic,),
            dynamo=True,
            verbose=False,
        )
        served[name] = onnxruntime_network(tmp_path / f"{name}.onnx", MTCNN_OUTPUTS[name])
        images = torch.rand(3, 3, size or 41, size or 57, generator=torch.Generator().manual_seed(1)) * 2 - 1
        with torch.no_grad():
            expected = module(images)
        for output, value in zip(MTCNN_OUTPUTS[name], expected, strict=True):
            torch.testing.assert_close(served[name](images=images)[output], value, atol=1e-5, rtol=0)

    by_engine = BatchedMTCNN(served)
    for frames in (group_picture, clip(96)):
        ours, theirs = by_engine.detect(frames), detector.detect(frames)
        assert torch.equal(ours.frame_index, theirs.frame_index)
        torch.testing.assert_close(ours.boxes, theirs.boxes, atol=0.01, rtol=0)
        torch.testing.assert_close(ours.landmarks, theirs.landmarks, atol=0.01, rtol=0)
        torch.testing.assert_close(ours.probabilities, theirs.probabilities, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "size"), [("pnet", 37), ("rnet", 24), ("onet", 48)])
def test_networks_equal_facenets(name: str, size: int, networks: dict[str, nn.Module], facenet: MTCNN) -> None:
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        *expected, classes = getattr(facenet, name)(images)
        for ours, theirs in zip(networks[name](images), (*expected, classes[:, 1]), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
