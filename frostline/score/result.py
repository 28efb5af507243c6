"""Define the result of one video, and the columns of results files. docs/scoring.md lists the same columns."""

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
    """The result of one pair. The fields are the keys of JSON Lines and the columns of CSV, in the order of `columns`.

    Cosines are in [-1, 1] and rates in [0, 1]. Boxes are (left, top, right, bottom) and landmarks (x, y), in pixels of
    the video's frames. Missing values of error rows, or of videos without a face, are null (empty in CSV).

    Attributes:
        index: the position in the input.
        error: the reason if the video could not be scored.
        note: remarks on the video, including rewards that could not score it; remarks on its reference follow
            `REFERENCE_NOTE`.
        scores: scores and metrics of the rewards except `face_identity`, by column; missing values are omitted.
        face_score: the score of `face_identity`.
        face_score_missing_zero: the same, with 0 for frames without a face.
        frames: the number of scored frames.
        max_faces: the maximum number of faces in a frame; `settings` says which of them is scored.
        frame_numbers: the indices of the scored frames.
        frame_scores: the score of each scored frame; None for a frame without a face.
        worst_frame: the frame with the lowest score, with its score, box and landmarks in `worst_frame_*`.
        best_frame: the frame with the highest score, with its score, box and landmarks in `best_frame_*`.
        seconds: the duration of decoding, plus this video's share of its batches.
        backends: the backends that computed `scores`, as `reward.stage=backend`.
        settings: all settings that the scores depend on.
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
        """Return these columns as one line of JSON, without a newline."""
        encoded = json.dumps(self.plain(names), ensure_ascii=False, separators=(",", ":"))
        return json_text(encoded)

    @classmethod
    def of_json_line(cls, line: str) -> VideoScore:
        """Parse a line that `json_line` returned.

        Raises:
            ValueError: the line is not a valid result.
        """
        values = parse_json(line)
        if not isinstance(values, dict):
            raise ValueError("must be a mapping")
        return cls._of_flat(values)

    def cells(self, names: Sequence[str]) -> list[str]:
        """Return these columns as cells of a CSV row. Lists are JSON; newlines become spaces; formulas are escaped."""
        return [_cell(value) for value in self.plain(names).values()]

    @classmethod
    def of_cells(cls, cells: dict[str, str]) -> VideoScore:
        """Parse cells that `cells` returned.

        Raises:
            ValueError: the cells are not a valid result.
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
        """Return these columns as values that JSON supports."""
        values = self.model_dump(mode="json", exclude={"scores"})
        return {name: values[name] if name in FIELDS else self.scores.get(name) for name in names}

    @classmethod
    def _of_flat(cls, values: Mapping[str, Any]) -> VideoScore:
        fields = {name: value for name, value in values.items() if name in FIELDS}
        scores = {name: value for name, value in values.items() if name not in FIELDS and value is not None}
        return cls.model_validate({**fields, "scores": scores})


def columns(scores: Iterable[str] = (), faces: bool = True) -> tuple[str, ...]:
    """Return the columns of a results file.

    Args:
        scores: scores and metrics of the rewards except `face_identity`.
        faces: whether `face_identity` is one of the rewards.
    """
    scores = tuple(scores)
    left_out = {*(() if scores else ("backends",)), *(() if faces else OF_FACES)}
    names: list[str] = []
    for name in VideoScore.model_fields:
        if name not in left_out:
            names += scores if name == "scores" else (name,)
    return tuple(names)


REFERENCE_NOTE = "reference: "
"""Separates remarks on the reference from remarks on the video in a note."""
OF_FACES = (
    *("face_score", "detection_rate", "face_score_missing_zero", "frames_with_face", "max_faces"),
    *(f"{which}_frame{what}" for which in ("worst", "best") for what in ("", "_score", "_box", "_landmarks")),
    *("face_detector", "face_detector_backend", "face_embedder", "face_embedder_backend"),
    *("frame_numbers", "frame_scores"),
)
"""The columns of `face_identity`."""
FIELDS = frozenset(VideoScore.model_fields) - {"scores"}
"""Column names that cannot be used as labels of rewards."""
FACE_SCORE = "face_score"
COLUMNS = columns()
"""The columns of results with `face_identity` as the only reward."""
# Newlines only: `splitlines` also splits at other characters, which can be part of a file name.
_LINE_END = re.compile(r"\r\n?|\n")
_LISTS = ("worst_frame_", "best_frame_", "frame_numbers", "frame_scores")


def one_line(text: str) -> str:
    """Return a text with spaces instead of newlines, as in CSV files."""
    return _LINE_END.sub(" ", text)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return json.dumps(value, separators=(",", ":"))
    return csv_cell(one_line(value)) if isinstance(value, str) else str(value)
