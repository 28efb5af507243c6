"""Compare clips of one sample side by side: one player for all clips, and their frames with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from frostline.report.contact_sheet import shown_frames, strip_jpeg
from frostline.report.embedding import data_uri, read_bytes
from frostline.report.formatting import Trend, fixed
from frostline.video import probe_video, read_video

_STRIP_HEIGHT = 160
_FALLBACK_FPS = 8.0


@dataclass(frozen=True)
class ScoreChange:
    """A formatted score before and after, such as "0.578", "0.664" and "+0.086"; `before` and `change` can be empty."""

    label: str
    before: str
    after: str
    change: str = ""
    trend: Trend = "same"


@dataclass(frozen=True)
class Clip:
    """A clip and its shown frames.

    Attributes:
        label: the name of the clip.
        alt: the alternative text.
        video: the clip as a data URI.
        strip: the shown frames side by side, as a data URI.
        caption: the text below the clip.
        shown: the number of frames in the strip.
        scores: the formatted score of each shown frame; empty if there are none.
    """

    label: str
    alt: str
    video: str
    strip: str
    caption: str
    shown: int
    scores: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Clips of one sample. Use `of` to create one.

    Attributes:
        title: the heading.
        note: a remark after the heading, in grey.
        scores: the scores of the sample.
        clips: the clips.
        fps: frames per second.
        last_frame: the index of the last frame of the longest clip.
        numbers: the indices of the shown frames of the longest clip.
    """

    title: str
    note: str
    scores: tuple[ScoreChange, ...]
    clips: tuple[Clip, ...]
    fps: float
    last_frame: int
    numbers: tuple[int, ...]

    @classmethod
    def of(
        cls,
        title: str,
        note: str,
        clips: Mapping[str, Path],
        scores: Sequence[ScoreChange] = (),
        frame_scores: Mapping[str, Sequence[float | None]] | None = None,
        captions: Mapping[str, str] | None = None,
    ) -> Comparison:
        """Read the clips.

        Args:
            title: the heading.
            note: a remark after the heading.
            clips: the MP4 files by label, at least one.
            scores: the scores of the sample.
            frame_scores: the score of each frame, by label; ignored if their number differs from the number of frames.
            captions: additional text after the label of a clip, by label.
        Raises:
            DataError: a clip cannot be read.
        """
        videos = {label: read_video(path) for label, path in clips.items()}
        longest = max(map(len, videos.values()))
        numbers = tuple(shown_frames(longest))
        made = []
        for label, frames in videos.items():
            own = [number for number in numbers if number < len(frames)]
            values = (frame_scores or {}).get(label, ())
            made.append(
                Clip(
                    label,
                    f"{label}: {title}",
                    data_uri(read_bytes(clips[label]), "video/mp4"),
                    data_uri(strip_jpeg(frames, own, _STRIP_HEIGHT), "image/jpeg"),
                    " ".join(filter(None, (label, (captions or {}).get(label, "")))),
                    len(own),
                    tuple(fixed(values[number], 2) for number in own) if len(values) == len(frames) else (),
                )
            )
        fps = max(probe_video(path).fps for path in clips.values()) or _FALLBACK_FPS
        return cls(title, note, tuple(scores), tuple(made), fps, longest - 1, numbers)
