"""One scored video, and the columns in which it is written. docs/scoring.md lists them; keep the two together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from frostline.documents import parse_json
from frostline.escaping import csv_cell, json_text, text_of_csv_cell

Landmarks = tuple[tuple[float, float], ...]


class VideoScore(BaseModel):
    """What became of one pair; its fields are the keys of JSON Lines and the columns of CSV, in the order of `columns`.

    Cosines lie in [-1, 1], rates in [0, 1]; boxes are left, top, right, bottom and landmarks x, y in pixels of the
    video's own frames. What an error row, or a video without a face, has no value for is null (empty in CSV).

    index: place in the input. error: why the video could not be scored. note: what else there is to know of it, which
    rewards had nothing to score and why, and behind `REFERENCE_NOTE` what there is to know of its reference.
    scores: of the rewards but `face_identity`, and their metrics, by column; one that is missing has no value.
    face_score: the reward. face_score_missing_zero: the same with every frame without a face as 0.
    frames: that were scored. max_faces: most faces in one frame; which of them counts, the settings say.
    frame_numbers, frame_scores: of the scored frames; a frame without a face has no score.
    worst_*, best_*: of the frames with the lowest and the highest score.
    seconds: decoding plus this video's share of the batches it was in. backends: what computed `scores`, as
    `reward.stage=backend`. settings: all that the score depends on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    video: str
    reference: str
    prompt: str = ""
    status: Literal["ok", "error"]
    error: str = ""
    note: str = ""
    scores: Mapping[str, float] = {}
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
    backends: str = ""
    settings: str
    frame_numbers: tuple[int, ...] | None = None
    frame_scores: tuple[float | None, ...] | None = None

    @field_validator("scores")
    @classmethod
    def _are_numbers(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        if not all(map(math.isfinite, value.values())):
            raise ValueError("scores must be finite")
        return value

    def json_line(self, names: Sequence[str]) -> str:
        """One line of JSON with these columns, without the line's end."""
        encoded = json.dumps(self.plain(names), ensure_ascii=False, separators=(",", ":"))
        return json_text(encoded)

    @classmethod
    def of_json_line(cls, line: str) -> VideoScore:
        """The inverse of `json_line`.

        Raises:
            ValueError: it is not that of a scored video.
        """
        values = parse_json(line)
        if not isinstance(values, dict):
            raise ValueError("must be a mapping")
        return cls._of_flat(values)

    def cells(self, names: Sequence[str]) -> list[str]:
        """The cells of a CSV row with these columns; none holds a line's end or is a formula, and lists are JSON."""
        return [_cell(value) for value in self.plain(names).values()]

    @classmethod
    def of_cells(cls, cells: dict[str, str]) -> VideoScore:
        """The inverse of `cells`.

        Raises:
            ValueError: they are not those of a scored video.
        """
        values: dict[str, Any] = {}
        for name, text in cells.items():
            if name not in FIELDS:
                values[name] = float(text) if text else None
                continue
            if text == "" and cls.model_fields[name].annotation is not str:
                continue
            is_list = text.startswith("[") and name.startswith(_LISTS)
            values[name] = parse_json(text) if is_list else text_of_csv_cell(text)
        return cls._of_flat(values)

    def plain(self, names: Sequence[str]) -> dict[str, Any]:
        """Return these columns as values that JSON has."""
        values = self.model_dump(mode="json", exclude={"scores"})
        return {name: values[name] if name in FIELDS else self.scores.get(name) for name in names}

    @classmethod
    def _of_flat(cls, values: Mapping[str, Any]) -> VideoScore:
        fields = {name: value for name, value in values.items() if name in FIELDS}
        scores = {name: value for name, value in values.items() if name not in FIELDS and value is not None}
        return cls.model_validate({**fields, "scores": scores})


def columns(scores: Iterable[str] = (), faces: bool = True) -> tuple[str, ...]:
    """The columns of a file of results.

    Args:
        scores: of rewards but `face_identity`, and their metrics.
        faces: whether `face_identity` is among the rewards.
    """
    scores = tuple(scores)
    left_out = {*(() if scores else ("backends",)), *(() if faces else OF_FACES)}
    names: list[str] = []
    for name in VideoScore.model_fields:
        if name not in left_out:
            names += scores if name == "scores" else (name,)
    return tuple(names)


REFERENCE_NOTE = "reference: "
"""In a note, before what is not of the video itself."""
OF_FACES = (
    *("face_score", "detection_rate", "face_score_missing_zero", "frames_with_face", "max_faces"),
    *(f"{which}_frame{what}" for which in ("worst", "best") for what in ("", "_score", "_box", "_landmarks")),
    *("face_detector", "face_detector_backend", "face_embedder", "face_embedder_backend"),
    *("frame_numbers", "frame_scores"),
)
"""Columns of `face_identity`."""
FIELDS = frozenset(VideoScore.model_fields) - {"scores"}
"""Columns that no reward may be called by."""
FACE_SCORE = "face_score"
COLUMNS = columns()
"""Of results of `face_identity` alone."""
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
