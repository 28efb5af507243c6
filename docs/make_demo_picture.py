"""Draw the picture of the demo: frames of two validation samples before and after training, with their face scores.

frostline demo                          # writes runs/demo
python docs/make_demo_picture.py        # writes docs/demo.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont

from frostline.train.loop.run_dir import VALIDATION, read_lines
from frostline.video import read_video

_FRAME, _GAP, _LABEL, _LINE = 168, 6, 96, 26
_GREY, _BLACK = "#5f6b76", "#1b2025"


def main() -> None:
    """Draw the clips of a run's first and last validation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, nargs="?", default=Path("runs/demo"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument(
        "--clips", type=int, nargs="+", default=[0, 8], help="indices of validation samples (default: %(default)s)"
    )
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[0, 4, 5, 6, 7, 8], help="indices of frames (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo.jpg", help="default: %(default)s")
    arguments = parser.parse_args()
    validation = read_lines(arguments.run / VALIDATION)
    samples = [_sample(arguments.run, validation, clip, arguments.frames) for clip in arguments.clips]
    width = max(sample.width for sample in samples)
    picture = Image.new("RGB", (width, sum(sample.height for sample in samples)), "white")
    top = 0
    for sample in samples:
        picture.paste(sample, (0, top))
        top += sample.height
    picture.save(arguments.out, quality=88)


def _sample(run: Path, validation: list[dict[str, Any]], clip: int, frames: list[int]) -> Image.Image:
    """Draw three rows: the true clip, and the clips generated from its first frame before and after training."""
    rows: list[tuple[str, str, list[float] | None]] = [("true clip", "truth", None)]
    for name, line in (("before", validation[0]), ("after", validation[-1])):
        rows.append((name, f"step-{line['step']:06d}", line["frames"]["face_score"][clip]))
    heights = [_FRAME + _GAP + (0 if scores is None else _LINE) for _, _, scores in rows]
    image = Image.new("RGB", (_LABEL + len(frames) * (_FRAME + _GAP), sum(heights) + _LINE), "white")
    draw, font = ImageDraw.Draw(image), _font(17)
    for column, frame in enumerate(frames):
        draw.text((_centre(column), _LINE // 2), f"frame {frame}", fill=_GREY, font=font, anchor="mm")
    top = _LINE
    for (name, folder, scores), height in zip(rows, heights, strict=True):
        video = read_video(run / "validation" / folder / f"{clip}.mp4")
        draw.text((_LABEL - 10, top + _FRAME // 2), name, fill=_BLACK, font=font, anchor="rm")
        for column, frame in enumerate(frames):
            image.paste(_face(video[frame]), (_centre(column) - _FRAME // 2, top))
            if scores is not None:
                # NaN: no face was found.
                score = "no face" if scores[frame] != scores[frame] else f"{scores[frame]:.2f}"
                place = (_centre(column), top + _FRAME + _LINE // 2)
                draw.text(place, score, fill=_BLACK, font=font, anchor="mm")
        top += height
    return image


def _centre(column: int) -> int:
    return _LABEL + column * (_FRAME + _GAP) + _FRAME // 2


def _face(frame: torch.Tensor) -> Image.Image:
    pixels = frame if frame.dtype == torch.uint8 else (frame.clamp(0, 1) * 255).round().byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((_FRAME, _FRAME), Image.Resampling.BICUBIC)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


if __name__ == "__main__":
    main()
