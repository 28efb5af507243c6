"""YuNet compared with OpenCV's FaceDetectorYN, and SCRFD's decoding with a plain copy of insightface's."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from scrfd_file import scrfd_file
from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.faces import Detections, FaceDetector, YuNet, dense, load_detector
from frostline.models.faces.networks import bundled_model


@pytest.fixture(scope="module")
def yunet() -> FaceDetector:
    return load_detector("yunet").in_torch()


@pytest.fixture(scope="module")
def opencv() -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return a function that gives OpenCV's boxes (K, 4), scores (K,) and landmarks (K, 5, 2), largest face first."""
    detector = cv2.FaceDetectorYN.create(str(bundled_model("face_detection_yunet_2023mar_int8bq.onnx")), "", (320, 320))

    def detect(frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = np.ascontiguousarray(frame.permute(1, 2, 0).numpy()[..., ::-1])
        detector.setInputSize((image.shape[1], image.shape[0]))
        found = detector.detect(image)[1]
        faces = torch.zeros(0, 15) if found is None else torch.from_numpy(found)
        faces = faces[faces[:, 2:4].double().prod(dim=1).argsort(descending=True, stable=True)]
        return (
            torch.cat([faces[:, :2], faces[:, :2] + faces[:, 2:4]], 1),
            faces[:, 14],
            faces[:, 4:14].reshape(-1, 5, 2),
        )

    return detect


def of_frame(found: Detections, frame: int) -> tuple[Tensor, Tensor, Tensor]:
    own = found.frame_index == frame
    return found.boxes[own], found.probabilities[own], found.landmarks[own]


def assert_same_faces(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], pixels: float = 0.01, scores: float = 1e-4
) -> None:
    """Compare each face with the nearest one: many faces of a random network have nearly equal areas or scores."""
    assert len(actual[0]) == len(expected[0])
    ours, theirs = (torch.cat([boxes, points.flatten(1)], 1).double() for boxes, _, points in (actual, expected))
    nearest = (ours[:, None] - theirs[None]).abs().amax(2).argmin(1) if len(ours) else torch.zeros(0).long()
    assert len(nearest.unique()) == len(ours)
    torch.testing.assert_close(ours, theirs[nearest], atol=pixels, rtol=0)
    torch.testing.assert_close(actual[1], expected[1][nearest], atol=scores, rtol=0)


def test_yunet_equals_opencv_on_every_picture(
    yunet: FaceDetector, opencv: Callable, pictures: dict[str, Tensor], group_picture: Tensor
) -> None:
    faces = 0
    for frame in (*pictures.values(), group_picture[0]):
        expected = opencv(frame)
        assert_same_faces(of_frame(yunet.detect(frame[None]), 0), expected)
        faces += len(expected[0])
    assert faces >= 20


@pytest.mark.parametrize("name", ["yunet", "scrfd"])
def test_a_frame_alone_is_the_frame_in_a_batch(
    name: str, yunet: FaceDetector, scrfd: FaceDetector, clip: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = yunet if name == "yunet" else scrfd
    frames = torch.cat([clip(120), torch.full((1, 3, 120, 120), 127, dtype=torch.uint8), clip(120, 3, "hopper")])
    together = detector.detect(frames)
    assert together.largest().found.sum() >= 6
    monkeypatch.setattr(dense, "_PIXELS_AT_ONCE", 3 * 120 * 120)
    in_parts = detector.detect(frames)
    assert torch.equal(in_parts.frame_index, together.frame_index)
    for t, frame in enumerate(frames):
        alone = of_frame(detector.detect(frame[None]), 0)
        assert_same_faces(of_frame(together, t), alone, pixels=1e-3)
        assert_same_faces(of_frame(in_parts, t), alone, pixels=1e-3)


def test_yunet_reports_original_pixels(yunet: FaceDetector, opencv: Callable, clip: Callable[..., Tensor]) -> None:
    frames = clip(64)
    found = yunet.detect(frames, upscale=2)
    assert found.frame_size == (64, 64)
    boxes, scores, landmarks = opencv(
        torch.nn.functional.interpolate(frames[:1].float(), scale_factor=2, mode="bicubic")
        .round()
        .clamp(0, 255)
        .byte()[0]
    )
    assert_same_faces(of_frame(found, 0), ((boxes + 0.5) / 2 - 0.5, scores, (landmarks + 0.5) / 2 - 0.5))


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (2, 3, 1, 1), (1, 3, 20, 300)])
def test_frames_without_a_face(shape: tuple[int, ...], yunet: FaceDetector) -> None:
    found = yunet.detect(torch.full(shape, 128, dtype=torch.uint8))
    assert (len(found), found.num_frames, found.frame_size) == (0, shape[0], shape[2:])
    assert not found.largest().found.any()


@pytest.fixture(scope="module")
def scrfd_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scrfd_file(tmp_path_factory.mktemp("scrfd") / "scrfd_random.onnx")


@pytest.fixture(scope="module")
def scrfd(scrfd_path: Path) -> FaceDetector:
    return load_detector(f"scrfd:{scrfd_path}").in_torch()


def plain_scrfd(path: Path, image: np.ndarray, threshold: float = 0.5, overlap: float = 0.4) -> tuple[Tensor, ...]:
    """Run insightface's `SCRFD.detect`, written with loops, on one (H, W, 3) uint8 RGB image, with onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    height, width = (-(-side // 32) * 32 for side in image.shape[:2])
    canvas = np.zeros((height, width, 3), np.float32)
    canvas[: image.shape[0], : image.shape[1]] = image
    blob = ((canvas - 127.5) / 128).transpose(2, 0, 1)[None]
    outputs = [np.asarray(output) for output in session.run(None, {session.get_inputs()[0].name: blob})]
    faces = []
    for level, stride in enumerate((8, 16, 32)):
        scores, boxes, points = outputs[level], outputs[level + 3], outputs[level + 6]
        anchor = 0
        for y in range(height // stride):
            for x in range(width // stride):
                for _ in range(2):
                    cx, cy, d = x * stride, y * stride, boxes[anchor] * stride
                    if scores[anchor, 0] >= threshold:
                        landmarks = points[anchor].reshape(5, 2) * stride + [cx, cy]
                        faces.append(
                            (float(scores[anchor, 0]), [cx - d[0], cy - d[1], cx + d[2], cy + d[3]], landmarks)
                        )
                    anchor += 1
        assert anchor == len(scores)
    kept: list[tuple] = []
    for face in sorted(faces, key=lambda face: -face[0]):
        if all(iou_with_end_pixels(face[1], other[1]) <= overlap for other in kept):
            kept.append(face)
    kept.sort(key=lambda face: -(face[1][2] - face[1][0]) * (face[1][3] - face[1][1]))
    return (
        torch.tensor(np.array([face[1] for face in kept]), dtype=torch.float32).reshape(-1, 4),
        torch.tensor([face[0] for face in kept]),
        torch.tensor(np.array([face[2] for face in kept]), dtype=torch.float32).reshape(-1, 5, 2),
    )


def iou_with_end_pixels(a: list[float], b: list[float]) -> float:
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1) * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return inter / (sum(areas) - inter)


@pytest.mark.parametrize("size", [(96, 128), (75, 50)])
def test_scrfd_decodes_as_insightface_does(size: tuple[int, int], scrfd: FaceDetector, scrfd_path: Path) -> None:
    photograph = Image.fromarray(skimage.data.astronaut()).resize(size[::-1])
    expected = plain_scrfd(scrfd_path, np.array(photograph))
    found = scrfd.detect(torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None])
    assert 3 <= len(expected[0]) < 200
    assert_same_faces(of_frame(found, 0), expected)


def test_scrfd_searches_large_frames_shrunk(scrfd: FaceDetector, scrfd_path: Path) -> None:
    frame = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None]
    wide = torch.nn.functional.interpolate(frame.float(), (400, 1280), mode="bilinear").round().byte()
    shrunk = cv2.resize(wide[0].permute(1, 2, 0).numpy(), (640, 200), interpolation=cv2.INTER_LINEAR)
    boxes, scores, landmarks = plain_scrfd(scrfd_path, shrunk)
    found = of_frame(scrfd.detect(wide), 0)
    # OpenCV rounds its bilinear weights to 11 bits, so single pixels differ by 1; random weights enlarge this.
    assert_same_faces(
        tuple(part[:3] for part in found), (boxes[:3] * 2, scores[:3], landmarks[:3] * 2), pixels=3, scores=0.01
    )


def test_files_of_another_layout_are_refused(scrfd_path: Path) -> None:
    yunet_path = bundled_model("face_detection_yunet_2023mar_int8bq.onnx")
    with pytest.raises(ConfigError, match="12 outputs; an SCRFD file with landmarks has nine"):
        load_detector(f"scrfd:{yunet_path}")
    with pytest.raises(ConfigError, match="no such ONNX file"):
        load_detector("scrfd:absent.onnx")
    for spec in ("", "scrfd", "yunet:x", "mtcnn:x", "retina"):
        with pytest.raises(ConfigError, match="unknown face detector"):
            load_detector(spec)


def test_scores_decide(yunet: FaceDetector, clip: Callable[..., Tensor]) -> None:
    assert isinstance(yunet, YuNet)
    lenient = YuNet(yunet.network, score_threshold=0.3)
    frames = clip(120)
    assert len(lenient.detect(frames)) >= len(yunet.detect(frames)) > 0
    assert yunet.detect(frames).probabilities.min() >= 0.9
