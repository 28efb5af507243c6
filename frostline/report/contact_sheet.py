"""Draw contact sheets: frames of clips in labelled rows, in one PNG file."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from frostline.atomic_io import atomic_write
from frostline.errors import DataError
from frostline.report.formatting import fixed

# A grey with a contrast of 4.3:1 on both white and dark pages, because the background of the sheet is transparent.
_TEXT_COLOUR = (112, 124, 137, 255)

# The layout, in pixels before scaling.
_CAPTION_SIZE, _LABEL_SIZE, _SCORE_SIZE = 15, 12, 11
_CAPTION_HEIGHT, _LINE_HEIGHT, _CAPTION_GAP = 20, 18, 9
_LABEL_GAP, _FRAME_GAP, _ROW_GAP = 14, 3, 40
_NUMBER_HEIGHT, _SCORE_HEIGHT = 17, 18
_MAX_FRAMES = 9
# At this JPEG quality, no difference is visible, and pages stay small.
_JPEG_QUALITY = 88


@dataclass(frozen=True)
class SheetRow:
    """One clip on the sheet.

    Attributes:
        caption: the text above the row; its first line is bold.
        strips: frames (T, 3, H, W) by label, float in [0, 1] or uint8, e.g. {"truth": …, "before": …, "after": …}.
        scores: a score or None for each of the T frames, by label; written below the frames, with frame indices above.
    """

    caption: str
    strips: Mapping[str, Tensor]
    scores: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


def contact_sheet(
    rows: Sequence[SheetRow],
    path: str | Path,
    frame_size: tuple[int, int] | None = None,
    max_frames: int = _MAX_FRAMES,
    scale: int = 2,
) -> Path:
    """Draw the rows into a PNG file with a transparent background.

    Args:
        rows: the rows of the sheet.
        path: the file to write.
        frame_size: (height, width) of a frame in layout pixels; by default height 96, with the first strip's aspect
            ratio.
        max_frames: the maximum number of frames per clip, evenly spaced, including the first and the last.
        scale: file pixels per layout pixel; 2 is sharp on high-resolution screens and in print.
    Returns:
        The path.
    Raises:
        DataError: there are no frames, their shape or dtype is invalid, the number of scores differs, or the file
            cannot be written.
    """
    path = Path(path)
    strips = [strip for row in rows for strip in row.strips.values()]
    if not strips:
        raise DataError(f"{path}: a contact sheet needs at least one strip of frames")
    for row in rows:
        for label, strip in row.strips.items():
            _check(strip, f"{path}: strip '{label}' of '{row.caption}'")
            if label in row.scores and len(row.scores[label]) != len(strip):
                numbers = f"{len(row.scores[label])} scores for {len(strip)} frames"
                raise DataError(f"{path}: strip '{label}' of '{row.caption}': {numbers}")
    if frame_size is None:
        frame_size = (96, round(96 * strips[0].shape[-1] / strips[0].shape[-2]))
    image = _draw(rows, frame_size, max_frames, scale)
    with atomic_write(path) as part:
        image.save(part, format="PNG")
    return path


def _draw(rows: Sequence[SheetRow], frame_size: tuple[int, int], max_frames: int, scale: int) -> Image.Image:
    height, width = frame_size
    frames = min(max_frames, max(len(strip) for row in rows for strip in row.strips.values()))
    label_font, caption_font = _font(_LABEL_SIZE * scale), _font(_CAPTION_SIZE * scale, bold=True)
    score_font = _font(_SCORE_SIZE * scale)
    labels = [label for row in rows for label in row.strips]
    left = round(max(label_font.getlength(label) for label in labels) / scale) + _LABEL_GAP
    sheet_width = left + frames * (width + _FRAME_GAP) - _FRAME_GAP
    heights = [_row_height(row, height) for row in rows]
    sheet_height = sum(heights) + _ROW_GAP * (len(rows) - 1)
    sheet = Image.new("RGBA", (sheet_width * scale, sheet_height * scale), (255, 255, 255, 0))
    draw = ImageDraw.Draw(sheet)

    top = 0
    for row, row_height in zip(rows, heights, strict=True):
        y = top
        for index, line in enumerate(row.caption.splitlines()):
            font = label_font if index else caption_font
            text = _shortened(line, font, (sheet_width - left) * scale)
            draw.text((left * scale, y * scale), text, font=font, fill=_TEXT_COLOUR)
            y += _LINE_HEIGHT if index else _CAPTION_HEIGHT
        y += _CAPTION_GAP
        columns = [left + column * (width + _FRAME_GAP) for column in range(frames)]
        shown = shown_frames(max(map(len, row.strips.values()), default=1), frames)
        if row.scores:
            for x, number in zip(columns, shown, strict=False):
                place = ((x + width / 2) * scale, y * scale)
                draw.text(place, str(number), font=score_font, fill=_TEXT_COLOUR, anchor="ma")
            y += _NUMBER_HEIGHT
        for label, strip in row.strips.items():
            middle = ((left - _LABEL_GAP) * scale, (y + height // 2) * scale)
            draw.text(middle, label, font=label_font, fill=_TEXT_COLOUR, anchor="rm")
            own = [number for number in shown if number < len(strip)]
            for x, frame in zip(columns, _pictures(strip, own), strict=False):
                picture = frame.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
                sheet.paste(picture, (x * scale, y * scale))
            y += height + _FRAME_GAP
            if label in row.scores:
                scores = row.scores[label]
                for x, number in zip(columns, own, strict=False):
                    place = ((x + width / 2) * scale, y * scale)
                    draw.text(place, fixed(scores[number], 2), font=score_font, fill=_TEXT_COLOUR, anchor="ma")
                y += _SCORE_HEIGHT
        top += row_height + _ROW_GAP
    return sheet


def _row_height(row: SheetRow, frame_height: int) -> int:
    lines = len(row.caption.splitlines())
    caption = (_CAPTION_HEIGHT + (lines - 1) * _LINE_HEIGHT if lines else 0) + _CAPTION_GAP
    scored = sum(label in row.scores for label in row.strips)
    numbers = _NUMBER_HEIGHT if row.scores else 0
    return caption + numbers + len(row.strips) * (frame_height + _FRAME_GAP) - _FRAME_GAP + scored * _SCORE_HEIGHT


def shown_frames(frames: int, count: int = _MAX_FRAMES) -> list[int]:
    """Return the indices of at most `count` evenly spaced frames, including the first and the last."""
    return np.linspace(0, frames - 1, min(count, frames)).round().astype(int).tolist()


def strip_jpeg(strip: Tensor, numbers: Sequence[int], height: int) -> bytes:
    """Return frames of a clip side by side as a JPEG.

    Args:
        strip: the clip, (T, 3, H, W), float in [0, 1] or uint8.
        numbers: the indices of the frames.
        height: the maximum height in pixels; smaller frames are not enlarged.
    """
    pictures = _pictures(strip, numbers)
    height = min(height, pictures[0].height)
    width = max(1, pictures[0].width * height // pictures[0].height)
    whole = Image.new("RGB", (width * len(pictures), height))
    for number, picture in enumerate(pictures):
        whole.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (number * width, 0))
    buffer = io.BytesIO()
    whole.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _pictures(strip: Tensor, numbers: Sequence[int]) -> list[Image.Image]:
    pixels = strip[[*numbers]].detach().cpu()
    if pixels.is_floating_point():
        pixels = (pixels.float().nan_to_num().clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in pixels]


def _check(strip: Tensor, name: str) -> None:
    if strip.ndim != 4 or strip.shape[1] != 3 or 0 in strip.shape:
        raise DataError(f"{name}: frames must be (T, 3, H, W), not {tuple(strip.shape)}")
    if not strip.is_floating_point() and str(strip.dtype) != "torch.uint8":
        raise DataError(f"{name}: frames must be uint8 or float in [0, 1], not {strip.dtype}")


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which is part of matplotlib and supports many scripts."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text, truncated with an ellipsis if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"
