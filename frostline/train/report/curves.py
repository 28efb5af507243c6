"""Make the training curves of a run's report: scores, losses, gradient norm, seconds per step and memory."""

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

# The keys of metrics.jsonl that do not depend on the rewards.
_OF_THE_TRAINER = (
    *("step", "loss", "score", "kl_loss", "kl_weight", "sft_loss", "grad_norm", "learning_rate", "skipped", "seconds"),
    "peak_memory_gb",
)
_KL = (
    "KL divergence measures how much the predictions of the trained model differ from those of the base model. "
    "It is part of the loss, to keep the model close to the base model."
)


def curves(metrics: Metrics, measures: Measures, config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Figure]:
    """Return the curves of rewards with their baselines, losses, other metrics, seconds per step and memory."""
    rewards = measures.rewards or ("score",)
    baselines = _baselines(rewards, config)
    figures = [
        _curve(
            metrics,
            name,
            f"{label(name)} while training",
            "The score of the clips of each training step. It varies, because each step has other clips, and some are "
            "harder than others."
            + (" The dashed line is the baseline, at which the reward is zero." if name in baselines else ""),
            rules={"baseline": baselines[name]} if name in baselines else None,
        )
        for name in rewards
    ]
    summed = "The weighted sum of the negative rewards, the KL loss and, with sft_weight, the flow-matching loss."
    figures.append(_curve(metrics, "loss", "Loss", summed))
    figures.append(_curve(metrics, "kl_loss", "KL divergence from the base model", _KL, ylabel="KL"))
    weights = [row["kl_weight"] for row in metrics if is_number(row.get("kl_weight"))]
    if len({*weights}) > 1:
        adapted = "Adapted after each step, so that the KL loss stays near kl_target."
        figures.append(_curve(metrics, "kl_weight", "Weight of the KL loss", adapted))
    if any(is_number(row.get("sft_loss")) for row in metrics):
        clips = "Flow-matching loss on the clips of the dataset, before it is multiplied by sft_weight."
        figures.append(_curve(metrics, "sft_loss", "Loss on the clips of the dataset", clips))
    beside = dict.fromkeys(name for row in metrics for name, value in row.items() if is_number(value))
    for name in (name for name in beside if name not in (*_OF_THE_TRAINER, *rewards)):
        figures.append(_curve(metrics, name, label(name), "Metric of each training step, in addition to the score."))
    figures += [
        _curve(metrics, "grad_norm", "Gradient norm", "The norm before clipping.", ylabel="gradient norm"),
        _curve(metrics, "learning_rate", "Learning rate", "", smooths=False),
        _pace(metrics, facts),
    ]
    if any(is_number(row.get("peak_memory_gb")) for row in metrics):
        what = "GPU memory of tensors in each step." if "gpu" in facts.get("machine", {}) else "Memory of the process."
        top = max(number_of(row, "peak_memory_gb") for row in metrics if is_number(row.get("peak_memory_gb")))
        figures.append(
            _curve(metrics, "peak_memory_gb", "Peak memory", what, "GB", smooths=False, y_range=(0, 1.1 * top or 1))
        )
    return figures


def settled(metrics: Metrics, facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the steps without the first one of each session, which loads engines and can time backends."""
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
    """Return the baselines by reward name; the configuration lists the rewards in the same order."""
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
    """Return the median seconds per step, without the first step of each session; None if there are no steps."""
    seconds = [number_of(row, "seconds") for row in settled(metrics, facts)]
    return statistics.median(seconds) if seconds else None
