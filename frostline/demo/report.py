"""The demo's report: what was gained, by which engines, at what speed, on one page for a newcomer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frostline.report.page import Cell, Column, Figure, Page, Tile
from frostline.report.plots import bar_plot, paired_plot
from frostline.report.words import (
    NONE,
    TIMES,
    change_tile,
    duration,
    fixed,
    milliseconds,
    number_of,
    plain,
    ratio,
    scientific,
)
from frostline.train.report import training_curves
from frostline.video import probe_video


def write_demo_report(
    path: Path,
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    sheet_png: Path,
    clips: Mapping[str, Path],
) -> None:
    """Write `report.html` from what `summary.json` and `metrics.jsonl` hold, the contact sheet and the clips.

    clips: label -> mp4, in reading order. Wide ones (several clips side by side in one file) stand one above the other.
    """
    page = Page("A video model learns to keep a face", _subtitle(summary))
    page.paragraph(_outcome(summary), lead=True)
    page.tiles(_tiles(summary))

    page.heading("Before and after")
    page.paragraph(
        "Each clip is generated from a first frame that the training never saw, and a prompt. "
        "Time runs from left to right: the further from that frame, the more a model forgets whom it shows."
    )
    alt = "Frames of held-out clips in rows: the true clip, the clip before training and the clip after training"
    page.figures(Figure.image(sheet_png, alt, wide=True))
    if clips:
        page.figures(*_videos(clips), **_clip_columns(clips))

    page.heading("What the training did")
    page.figures(_every_clip(summary), *training_curves(metrics), columns=2)

    page.heading("Which engine ran what")
    page.paragraph(
        "A training step is a chain of stages. Frozen stages carry no gradient, so any engine may run them; live "
        "stages teach the model and stay in PyTorch. Before an engine is used, its output is held against PyTorch's "
        "on the same input: parity is the largest difference found in any number of that output."
    )
    stages = summary.get("stages") or []
    page.table(_STAGE_COLUMNS, [_stage_row(stage) for stage in stages], caption=_STAGE_CAPTION)
    page.figures(*_timings(summary, stages), columns=2)

    page.heading("The run")
    settings = {name: plain(value) for name, value in (summary.get("settings") or {}).items()}
    versions = {name: plain(value) for name, value in (summary.get("versions") or {}).items()}
    page.facts({"device": plain(summary.get("device")), **versions, **settings})
    page.write(path)


def _subtitle(summary: Mapping[str, Any]) -> str:
    parts = ["frostline demo", summary.get("device"), duration(summary.get("seconds"))]
    return " · ".join(str(part) for part in parts if part)


def _outcome(summary: Mapping[str, Any]) -> str:
    """The result in two sentences, whichever way it went."""
    before, after = number_of(summary, "face_score_before"), number_of(summary, "face_score_after")
    gain = after - before
    if math.isnan(gain):
        return "The face score could not be measured."
    verb = "rose" if gain > 0 else "fell" if gain < 0 else "stayed"
    change = f"{verb} from {before:.3f} to {after:.3f}" if gain else f"{verb} at {after:.3f}"
    first = f"On clips it had never seen, the model's face score {change}"
    if "starts" in summary:
        first += f", and {summary.get('starts_up', 0)} of {summary['starts']} clips keep the face better than before"
    torch_ms, uncached_ms = number_of(summary, "step_ms_torch"), number_of(summary, "step_ms_hybrid_uncached")
    kept, engines = (ratio(torch_ms, ms) for ms in (number_of(summary, "step_ms_hybrid"), uncached_ms))
    if math.isnan(kept):
        return f"{first}."
    if math.isnan(engines):
        return f"{first}. With its frozen stages in engines, a training step ran {kept:.2f} times as fast as without."
    return (
        f"{first}. With its frozen stages in engines, a training step ran {engines:.2f} times as fast "
        f"as in PyTorch alone, and {kept:.2f} times with their outputs kept for the next pass over the data."
    )


def _tiles(summary: Mapping[str, Any]) -> list[Tile]:
    rates = [100 * number_of(summary, f"detection_rate_{when}") for when in ("before", "after")]
    up, starts = summary.get("starts_up"), summary.get("starts")
    torch_ms, hybrid_ms = number_of(summary, "step_ms_torch"), number_of(summary, "step_ms_hybrid")
    speedup = ratio(torch_ms, hybrid_ms)
    return [
        change_tile(
            "Face score",
            number_of(summary, "face_score_before"),
            number_of(summary, "face_score_after"),
            digits=3,
            note="How alike the faces in the generated frames and in the true clip are, as a cosine: "
            "1 is the same picture, 0.2 a stranger. Training rewards it.",
        ),
        Tile(
            "Clips that improved",
            plain(up),
            unit=f"of {starts}" if starts is not None else "",
            note="Held-out starts, not used in training, whose face score is higher after training than before.",
        ),
        change_tile(
            "Detection rate",
            *rates,
            digits=1,
            unit="%",
            note="Share of the generated frames in which a face is found. Only those are scored, so this must not "
            "fall: hiding the face is no way to keep it.",
        ),
        change_tile(
            "PSNR to truth",
            number_of(summary, "psnr_before"),
            number_of(summary, "psnr_after"),
            digits=2,
            unit="dB",
            note="How near the pixels are to those of the true clip, in decibels; higher is nearer. "
            "A clear fall would mean that the reward was won by spoiling the picture.",
            tolerance=0.3,
        ),
        Tile(
            "One training step",
            fixed(hybrid_ms, 0),
            unit="ms",
            before=fixed(torch_ms, 0),
            change="" if math.isnan(speedup) else _speed(speedup),
            trend="better" if speedup > 1 else "worse" if speedup < 1 else "same",
            note=_step_words(summary),
        ),
        Tile(
            "The whole demo",
            duration(summary.get("seconds")) or NONE,
            note="Data, export of the engines, training, and measuring before and after, on this machine.",
        ),
    ]


def _step_words(summary: Mapping[str, Any]) -> str:
    words = "The same step twice, in turns: every stage in PyTorch, then the frozen ones in engines"
    uncached = number_of(summary, "step_ms_hybrid_uncached")
    if math.isnan(uncached):
        return f"{words}."
    return (
        f"{words}, with outputs that never change kept from an earlier pass ({uncached:.0f} ms when nothing is kept)."
    )


def _videos(clips: Mapping[str, Path]) -> list[Figure]:
    return [Figure.video(clip, f"Clip: {name}", name, wide=_is_wide(clip)) for name, clip in clips.items()]


def _is_wide(clip: Path) -> bool:
    info = probe_video(clip)
    return info.width > 2 * info.height


def _clip_columns(clips: Mapping[str, Path]) -> dict[str, int]:
    if any(map(_is_wide, clips.values())):
        return {"columns": 1, "narrow_columns": 1}
    kinds = sum(any(kind in label.lower() for label in clips) for kind in ("truth", "before", "after"))
    return {"columns": 6, "narrow_columns": kinds or 2}


def _every_clip(summary: Mapping[str, Any]) -> Figure:
    before, after = summary.get("face_scores_before") or [], summary.get("face_scores_after") or []
    return Figure.svg(
        paired_plot(before, after, ylabel="face score"),
        alt="Face score of each held-out clip before and after training",
        title="Every held-out clip",
        caption="One line a clip, from its face score before training to its score after. "
        "The short bars are the means; a dashed line is a clip that got worse.",
    )


_STAGE_COLUMNS = (
    Column("Stage"),
    Column("Use"),
    Column("Backend"),
    Column("Hybrid, ms", "right"),
    Column("PyTorch, ms", "right"),
    Column("Speed", "right"),
    Column("Parity", "right"),
    Column("Why"),
)
_STAGE_CAPTION = (
    "Milliseconds are for one training step, with nothing kept from earlier ones. "
    "A live stage has no parity to prove: it is PyTorch."
)


def _stage_row(stage: Mapping[str, Any]) -> list[str | Cell]:
    hybrid, torch_ms, parity = (number_of(stage, name) for name in ("hybrid_ms", "torch_ms", "parity_max_abs"))
    speed = ratio(torch_ms, hybrid)
    return [
        plain(stage.get("stage")),
        plain(stage.get("use")),
        plain(stage.get("backend")),
        Cell(milliseconds(hybrid), hybrid),
        Cell(milliseconds(torch_ms), torch_ms),
        Cell(NONE if math.isnan(speed) else f"{speed:.2f} {TIMES}", speed),
        Cell(scientific(parity), parity),
        Cell(plain(stage.get("reason"), none=""), muted=True),
    ]


def _timings(summary: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[Figure]:
    names = [str(stage.get("stage")) for stage in stages]
    bars: dict[str, dict[str, float | None]] = {}
    for stage, name in zip(stages, names, strict=True):
        label = f"{name}, {stage.get('use')}" if names.count(name) > 1 else name
        bars[label] = {"hybrid": stage.get("hybrid_ms"), "PyTorch alone": stage.get("torch_ms")}
    step: dict[str, dict[str, float | None]] = {
        "hybrid, outputs kept": {"step": summary.get("step_ms_hybrid")},
        "hybrid, nothing kept": {"step": summary.get("step_ms_hybrid_uncached")},
        "PyTorch alone": {"step": summary.get("step_ms_torch")},
    }
    if step["hybrid, nothing kept"]["step"] is None:
        step = {"hybrid": step["hybrid, outputs kept"], "PyTorch alone": step["PyTorch alone"]}
    return [
        Figure.svg(bar_plot(bars, unit="ms"), "Milliseconds of each stage, hybrid and PyTorch", "Each stage"),
        Figure.svg(
            bar_plot(step, unit="ms"),
            alt="Milliseconds of one training step, hybrid and PyTorch",
            title="One training step",
            caption="Frozen outputs that do not change between two passes over the data can be kept and read again.",
        ),
    ]


def _speed(ratio: float) -> str:
    return f"{ratio:.2f} {TIMES} the speed"
