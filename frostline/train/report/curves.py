"""The part of a run's report that follows the training steps: scores, losses, gradient, pace and memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from frostline.report.formatting import fixed, number_of
from frostline.report.page import Figure
from frostline.report.plots import line_plot
from frostline.train.report.measures import Measures, is_number, label

Metrics = Sequence[Mapping[str, Any]]
"""The lines of metrics.jsonl."""

# What every line of metrics.jsonl has, whatever is rewarded.
_OF_THE_TRAINER = (
    *("step", "loss", "score", "kl_loss", "kl_weight", "sft_loss", "grad_norm", "learning_rate", "skipped", "seconds"),
    "peak_memory_gb",
)
_KL = (
    "KL measures how far the trained model's predictions have moved from the untrained model's. "
    "It is part of the loss, so that the reward is not bought with a broken model."
)


def curves(metrics: Metrics, measures: Measures, config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Figure]:
    """Return the rewards with their baselines, the losses, what was measured beside them, the pace and the memory."""
    rewards = measures.rewards or ("score",)
    baselines = _baselines(rewards, config)
    figures = [
        _curve(
            metrics,
            name,
            f"{label(name)} while training",
            "The score of the clips of each training step. It jumps about, as every step has other clips: some are "
            "harder than others."
            + (" The dashed line is the baseline, at which the reward is zero." if name in baselines else ""),
            rules={"baseline": baselines[name]} if name in baselines else None,
        )
        for name in rewards
    ]
    figures.append(
        _curve(
            metrics, "loss", "Loss", "What is minimised: the rewards with a minus sign and the KL, each by its weight."
        )
    )
    figures.append(_curve(metrics, "kl_loss", "Distance from the model it was", _KL, ylabel="KL"))
    weights = [row["kl_weight"] for row in metrics if is_number(row.get("kl_weight"))]
    if len({*weights}) > 1:
        adapted = "Adapted after each step, so that the KL loss stays near kl_target."
        figures.append(_curve(metrics, "kl_weight", "Weight of the KL loss", adapted))
    if any(is_number(row.get("sft_loss")) for row in metrics):
        clips = "Flow-matching loss on the data's own clips, part of the loss by sft_weight."
        figures.append(_curve(metrics, "sft_loss", "Loss on the data's clips", clips))
    beside = dict.fromkeys(name for row in metrics for name, value in row.items() if is_number(value))
    for name in (name for name in beside if name not in (*_OF_THE_TRAINER, *rewards)):
        figures.append(_curve(metrics, name, label(name), "Measured beside the score in each training step."))
    figures += [
        _curve(metrics, "grad_norm", "The gradient", "Its norm before it was clipped.", ylabel="gradient norm"),
        _curve(metrics, "learning_rate", "Learning rate", "", smooths=False),
        _pace(metrics, facts),
    ]
    if any(is_number(row.get("peak_memory_gb")) for row in metrics):
        what = "Of tensors on the GPU in each step." if "gpu" in facts.get("machine", {}) else "Of the process so far."
        top = max(number_of(row, "peak_memory_gb") for row in metrics if is_number(row.get("peak_memory_gb")))
        figures.append(
            _curve(metrics, "peak_memory_gb", "Peak memory", what, "GB", smooths=False, y_range=(0, 1.1 * top or 1))
        )
    return figures


def settled(metrics: Metrics, facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the steps but the first of each session: it loads engines and may time backends."""
    sessions = facts.get("sessions")
    firsts = {
        int(session["first_step"]) + 1
        for session in (sessions if isinstance(sessions, list) else [])
        if isinstance(session, Mapping) and is_number(session.get("first_step"))
    }
    steps = [row for row in metrics if "step" in row]
    firsts = firsts or {number_of(row, "step") for row in steps[:1]}
    return [row for row in steps if number_of(row, "step") not in firsts] or steps


def _pace(metrics: Metrics, facts: Mapping[str, Any]) -> Figure:
    shown = settled(metrics, facts)
    left_out = [row for row in metrics if "step" in row and row not in shown]
    said = "Outputs that do not change are cached after their first step."
    if left_out:
        seconds = [number_of(row, "seconds") for row in left_out]
        first = "The first step" if len(left_out) == 1 else "The first step after each start"
        said += f" {first}, which loads engines, is left out: {', '.join(fixed(each, 1) for each in seconds)} s."
    return _curve(shown, "seconds", "Seconds per step", said)


def _baselines(rewards: Sequence[str], config: Mapping[str, Any]) -> dict[str, float]:
    """The baselines of the rewards, which the configuration has in the order of their names."""
    entries = config.get("rewards")
    if not isinstance(entries, list) or len(entries) != len(rewards):
        return {}
    pairs = zip(rewards, entries, strict=True)
    return {
        name: float(entry["baseline"])
        for name, entry in pairs
        if isinstance(entry, Mapping) and is_number(entry.get("baseline"))
    }


def _curve(
    metrics: Metrics,
    name: str,
    title: str,
    caption: str,
    ylabel: str = "",
    rules: Mapping[str, float] | None = None,
    smooths: bool = True,
    y_range: tuple[float, float] | None = None,
) -> Figure:
    rows = [row for row in metrics if "step" in row]
    smooth, ylabel = max(1, len(rows) // 12) if smooths else 1, ylabel or name.replace("_", " ")
    average = f" The bold line is the average of {smooth} steps." if smooth > 1 else ""
    steps, series = [number_of(row, "step") for row in rows], {ylabel: [number_of(row, name) for row in rows]}
    plot = line_plot(
        series, x=steps, xlabel="training step", ylabel=ylabel, smooth=smooth, rules=rules, y_range=y_range
    )
    return Figure.svg(plot, alt=f"{ylabel} over the training steps", title=title, caption=caption + average)


def median_seconds(metrics: Metrics, facts: Mapping[str, Any]) -> float | None:
    """Return the median duration of a step, the first of each session left out; None without steps."""
    seconds = [number_of(row, "seconds") for row in settled(metrics, facts)]
    return statistics.median(seconds) if seconds else None
