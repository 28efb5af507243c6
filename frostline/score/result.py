"""One scored video, and the columns in which it is written. README.md lists them; keep the two together."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from frostline.documents import parse_json
from frostline.escaping import csv_cell, json_text, text_of_csv_cell

Landmarks = tuple[tuple[float, float], ...]


class VideoScore(BaseModel):
    """What became of one pair; its fields are the keys of JSON Lines and the columns of CSV, in this order.

    Cosines lie in [-1, 1], rates in [0, 1]; boxes are left, top, right, bottom and landmarks x, y in pixels of the
    video's own frames. What an error row, or a video without a face, has no value for is null (empty in CSV).

    index: place in the input. error: why the video could not be scored. note: what else there is to know of it, and
    behind `REFERENCE_NOTE` of its reference.
    face_score: the reward. face_score_missing_zero: the same with every frame without a face as 0.
    frames: that were scored. max_faces: most faces in one frame; which of them counts, the settings say.
    frame_numbers, frame_scores: of the scored frames; a frame without a face has no score.
    worst_*, best_*: of the frames with the lowest and the highest score.
    seconds: decoding plus this video's share of the batches it was in. settings: all that the score depends on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    video: str
    reference: str
    prompt: str = ""
    status: Literal["ok", "error"]
    error: str = ""
    note: str = ""
    face_score: float | None = None
    detection_rate: float | None = None
    face_score_missing_zero: float | None = None
    frames: int | None = None
    frames_with_face: int | None = None
    max_faces: int | None = None
    worst_frame: int | None = None
    worst_frame_score: float | None = None
    worst_frame_box: tuple[float, ...] | None = None
    worst_frame_landmarks: Landmarks | None = None
    best_frame: int | None = None
    best_frame_score: float | None = None
    best_frame_box: tuple[float, ...] | None = None
    best_frame_landmarks: Landmarks | None = None
    width: int | None = None
    height: int | None = None
    seconds: float | None = None
    face_detector: str = ""
    face_detector_backend: str = ""
    face_embedder: str = ""
    face_embedder_backend: str = ""
    settings: str
    frame_numbers: tuple[int, ...] | None = None
    frame_scores: tuple[float | None, ...] | None = None

    def json_line(self) -> str:
        """One line of JSON, without the line's end."""
        encoded = json.dumps(self.model_dump(mode="json"), ensure_ascii=False, separators=(",", ":"))
        return json_text(encoded)

    @classmethod
    def of_json_line(cls, line: str) -> VideoScore:
        """The inverse of `json_line`.

        Raises:
            ValueError: it is not that of a scored video.
        """
        return cls.model_validate(parse_json(line))

    def cells(self) -> list[str]:
        """The cells of a CSV row, none of which holds a line's end or is a formula; lists are JSON."""
        return [_cell(value) for value in self.model_dump(mode="json").values()]

    @classmethod
    def of_cells(cls, cells: dict[str, str]) -> VideoScore:
        """The inverse of `cells`.

        Raises:
            ValueError: they are not those of a scored video.
        """
        values: dict[str, Any] = {}
        for name, text in cells.items():
            field = cls.model_fields.get(name)
            if field is not None and text == "" and field.annotation is not str:
                continue
            is_list = text.startswith("[") and name.startswith(_LISTS)
            values[name] = parse_json(text) if is_list else text_of_csv_cell(text)
        return cls.model_validate(values)


REFERENCE_NOTE = "reference: "
"""In a note, before what is not of the video itself."""
COLUMNS = tuple(VideoScore.model_fields)
# Of a file; `splitlines` takes many more characters for one, and a name that loses them is another video's.
_LINE_END = re.compile(r"\r\n?|\n")
_LISTS = ("worst_frame_", "best_frame_", "frame_numbers", "frame_scores")


def one_line(text: str) -> str:
    """A text as CSV keeps it."""
    return _LINE_END.sub(" ", text)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return json.dumps(value, separators=(",", ":"))
    return csv_cell(one_line(value)) if isinstance(value, str) else str(value)
