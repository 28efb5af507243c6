"""Detection at another size finds the faces of frames of this size, in the coordinates of the original frames."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scrfd_file import scrfd_file
from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.faces import FaceDetector, FaceIdentity, Scrfd, SFaceEmbedder, load_detector, resize_frames
from frostline.rewards.config import RewardEntry
from frostline.score.settings import ScoreSettings


@pytest.fixture(scope="module")
def yunet() -> FaceDetector:
    return load_detector("yunet").in_torch()


def test_twice_the_size_is_upscale_2(yunet: FaceDetector, sface: SFaceEmbedder, clip: Callable[..., Tensor]) -> None:
    frames = clip(96, 2)
    sized, upscaled = (
        FaceIdentity(yunet, sface, **settings).observe(frames) for settings in ({"detection_size": 192}, {"upscale": 2})
    )
    assert sized.numbers.tolist() == [1, 1]
    for ours, theirs in zip(sized, upscaled, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [150, 420])
def test_faces_are_those_of_frames_of_that_size(
    size: int, yunet: FaceDetector, sface: SFaceEmbedder, clip: Callable[..., Tensor]
) -> None:
    """Compare with frames that Pillow resized, smaller and larger; height and width have separate scales."""
    frames = clip(280, 2)[:, :, :217]
    height = round(217 * size / 280)
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    resized = torch.from_numpy(
        np.stack([np.array(picture.resize((size, height), Image.Resampling.BICUBIC)) for picture in pictures])
    ).permute(0, 3, 1, 2)
    assert (resize_frames(frames, size).int() - resized.int()).abs().float().mean() < (0.6 if size < 280 else 1.5)
    expected = yunet.detect(resized).largest()
    faces = FaceIdentity(yunet, sface, detection_size=size).detect(frames[None] / 255)
    assert faces.found.all() and expected.found.all()
    scale = torch.tensor([280 / size, 217 / height])
    landmarks = (expected.landmarks + 0.5) * scale - 0.5
    # Pillow rounds intermediate results, and uses another cubic kernel for enlarging.
    torch.testing.assert_close(faces.landmarks[0], landmarks, atol=1.0, rtol=0)
    torch.testing.assert_close(
        faces.boxes[0], ((expected.boxes.unflatten(1, (2, 2)) + 0.5) * scale - 0.5).flatten(1), atol=1.5, rtol=0
    )


def test_frames_without_faces(yunet: FaceDetector, sface: SFaceEmbedder) -> None:
    identity = FaceIdentity(yunet, sface, detection_size=64)
    assert identity.detect(torch.zeros(1, 2, 3, 40, 50)).found.tolist() == [[False, False]]
    assert len(identity.observe(torch.zeros(0, 3, 40, 50, dtype=torch.uint8)).numbers) == 0


def test_scrfd_searches_frames_of_the_size_that_is_set(tmp_path: Path) -> None:
    scrfd_file(tmp_path / "scrfd.onnx")
    for detection_size, longest in ((None, 640), (320, 640), (1024, 1024)):
        detector = load_detector(f"scrfd:{tmp_path / 'scrfd.onnx'}", detection_size=detection_size).in_torch()
        assert isinstance(detector, Scrfd)
        assert detector.longest_side == longest


@pytest.mark.parametrize("parse", [lambda v: RewardEntry.parse({"type": "face_identity", **v}), ScoreSettings.parse])
def test_upscale_and_detection_size_exclude_each_other(parse: Callable[[dict[str, int]], object]) -> None:
    with pytest.raises(ConfigError, match="upscale and detection_size both set the size of frames for detection"):
        parse({"upscale": 2, "detection_size": 640})
    parse({"upscale": 1, "detection_size": 640})
    parse({"upscale": 2})


def test_an_option_of_a_score_is_held_against_those_of_its_rewards() -> None:
    entry = RewardEntry.parse({"type": "face_identity", "detection_size": 640})
    with pytest.raises(ConfigError, match="upscale and detection_size both set the size of frames for detection"):
        ScoreSettings.parse({"upscale": 2, "rewards": (entry,)})


def test_a_score_takes_the_order_of_channels(tmp_path: Path) -> None:
    settings = ScoreSettings.parse({"embedder": f"arcface:{tmp_path}/a.onnx", "channels": "bgr"})
    assert settings.faces is not None
    assert settings.faces.channels == "bgr"
