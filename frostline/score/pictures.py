"""Draw the pictures of the report: frames of videos and references, cropped to the face, with box and landmarks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image, ImageDraw

from frostline.errors import FrostlineError
from frostline.models.faces.detections import FaceDetector
from frostline.models.faces.detectors import load_detector
from frostline.rewards.face_identity import Config
from frostline.score.result import VideoScore
from frostline.video import stream_video
from frostline.video.downloads import DEFAULT_LIMITS, local_copy

_SIDE = 320
# The maximum number of frames of a reference that are searched for a face.
_SEARCHED = 8
_BOX_COLOUR, _POINT_COLOUR, _SHADE = (98, 181, 229), (255, 255, 255), (14, 19, 24)


@dataclass(frozen=True)
class FramePicture:
    """One frame as JPEG.

    Attributes:
        which: `worst` or `best`.
        number: the index of the frame in the file.
        score: the face score of the frame.
        jpeg: the encoded picture.
    """

    which: str
    number: int
    score: float
    jpeg: bytes


def extreme_pictures(row: VideoScore, every: int) -> list[FramePicture]:
    """Return the worst and the best frame of a scored video; an empty list if the video cannot be read anymore.

    Results contain the frame numbers but no pixels, so the frames are decoded again. This also works for runs that were
    resumed or used several processes.

    Args:
        row: the result of the video.
        every: the stride with which frames were scored.
    """
    wanted: dict[int, list[str]] = {}
    for which in ("worst", "best"):
        number = getattr(row, f"{which}_frame")
        if number is not None:
            wanted.setdefault(number, []).append(which)
    pictures: list[FramePicture] = []
    if not wanted:
        return pictures
    try:
        with local_copy(row.video, DEFAULT_LIMITS) as file:
            for number, array in stream_video(file, max(wanted) // every + 1, every, warn=lambda reason: None):
                for which in wanted.get(number, ()):
                    score, box, points = (
                        getattr(row, f"{which}_frame_{part}") for part in ("score", "box", "landmarks")
                    )
                    pictures.append(FramePicture(which, number, score, _draw(Image.fromarray(array), box, points)))
    except FrostlineError:
        return []
    return sorted(pictures, key=lambda picture: picture.which, reverse=True)


class ReferencePictures:
    """Find the faces of references with the detector of the run, in PyTorch. Results are cached by path.

    Args:
        settings: the settings of `face_identity`.
    """

    def __init__(self, settings: Config) -> None:
        self._settings = settings
        self._pictures: dict[str, bytes | None] = {}

    def face(self, path: str) -> bytes | None:
        """Return the largest face of a picture, or of the first video frame with a face, as JPEG.

        Returns:
            None if the first frames contain no face, or if the file or the detector cannot be read anymore.
        """
        if path not in self._pictures:
            try:
                self._pictures[path] = self._find(path)
            except FrostlineError:
                self._pictures[path] = None
        return self._pictures[path]

    @cached_property
    def _detector(self) -> FaceDetector:
        settings = self._settings
        return load_detector(settings.detector, settings.min_face_size, settings.detection_size).in_torch()

    @torch.no_grad()
    def _find(self, path: str) -> bytes | None:
        with local_copy(path, DEFAULT_LIMITS) as file:
            for _, array in stream_video(file, _SEARCHED, warn=lambda reason: None):
                frames = torch.from_numpy(array).permute(2, 0, 1)[None].contiguous()
                faces = self._detector.detect(frames, self._settings.upscale)
                if len(faces):
                    return _draw(Image.fromarray(array), faces.boxes[0].tolist(), faces.landmarks[0].tolist())
        return None


def _draw(image: Image.Image, box: Sequence[float], landmarks: Sequence[Sequence[float]]) -> bytes:
    left, top, side = _square_around(box, image.size)
    image = image.crop((left, top, left + side, top + side)).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    scale = _SIDE / side
    draw = ImageDraw.Draw(image)

    def place(x: float, y: float) -> tuple[float, float]:
        return (x + 0.5 - left) * scale, (y + 0.5 - top) * scale

    corners = (*place(box[0], box[1]), *place(box[2], box[3]))
    draw.rectangle(corners, outline=_SHADE, width=4)
    draw.rectangle(
        tuple(side + inset for side, inset in zip(corners, (1, 1, -1, -1), strict=True)), outline=_BOX_COLOUR, width=2
    )
    for x, y in (place(x, y) for x, y in landmarks):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=_POINT_COLOUR, outline=_SHADE, width=2)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    return buffer.getvalue()


def _square_around(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int]:
    """Return left, top and side of a square around the face with a margin, within the frame if it fits."""
    width, height = size
    side = round(min(max(2.0 * max(box[2] - box[0], box[3] - box[1]), 48), max(width, height)))
    centre_x, centre_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    left, top = round(centre_x - side / 2), round(centre_y - side / 2)
    left = min(max(left, 0), width - side) if side <= width else (width - side) // 2
    top = min(max(top, 0), height - side) if side <= height else (height - side) // 2
    return left, top, side
