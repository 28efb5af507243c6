"""Pictures of the report: frames of videos and references, cut around the face, with box and landmarks drawn in."""

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
# Frames of a reference that are searched for a face.
_SEARCHED = 8
_BOX_COLOUR, _POINT_COLOUR, _SHADE = (98, 181, 229), (255, 255, 255), (14, 19, 24)


@dataclass(frozen=True)
class FramePicture:
    """One frame as JPEG. which: worst or best."""

    which: str
    number: int
    score: float
    jpeg: bytes


def extreme_pictures(row: VideoScore, every: int) -> list[FramePicture]:
    """The worst and the best frame of a scored video, nothing where the file is gone meanwhile.

    Results hold only their numbers, so that pictures can be had of a run that was resumed, or spread over processes.

    Args:
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
    """The faces of references, found again by the detector that scored, in PyTorch; each is looked for once."""

    def __init__(self, settings: Config) -> None:
        self._settings = settings
        self._pictures: dict[str, bytes | None] = {}

    def face(self, path: str) -> bytes | None:
        """Return the largest face of a picture, or of the first frame of a video that shows one, as JPEG.

        None where there is no face in the first frames, or the file or the detector cannot be had any more.
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
    """Left, top and side of a square that shows the face with some of its surroundings, inside the frame if it can."""
    width, height = size
    side = round(min(max(2.0 * max(box[2] - box[0], box[3] - box[1]), 48), max(width, height)))
    centre_x, centre_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    left, top = round(centre_x - side / 2), round(centre_y - side / 2)
    left = min(max(left, 0), width - side) if side <= width else (width - side) // 2
    top = min(max(top, 0), height - side) if side <= height else (height - side) // 2
    return left, top, side
