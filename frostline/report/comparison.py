"""Clips of one sample side by side: a player that shows all of them at one frame, and their frames with scores."""

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
    """A number of a sample before and after, in words: "0.578", "0.664", "+0.086"; the first and last may be empty."""

    label: str
    before: str
    after: str
    change: str = ""
    trend: Trend = "same"


@dataclass(frozen=True)
class Clip:
    """A clip and its shown frames.

    alt: what it shows. video, strip: data URIs. caption: under the clip. shown: how many frames the strip has.
    scores: in words, of each of these; empty where there are none.
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
    """Clips of one sample; made by `of`.

    title, note: a heading, and a remark in grey behind it. fps: frames per second. last_frame: number of the last frame
    of the longest clip. numbers: of the shown frames, as far as the longest clip.
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
        """Read the clips, mp4 files by label, of which there is at least one.

        Args:
            frame_scores: by label, of each frame; left out where their number is not that of the frames.
            captions: by label, what stands behind it under the clip.
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
