"""Print the tables of `docs/performance.md`, or write those of all pages, from the results in `benchmarks/results/`.

python benchmarks/table.py           # print the tables of docs/performance.md
python benchmarks/table.py --write   # also write the tables of README and docs/ between the two marker comments
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
Tables = Mapping[str, Callable[[Result], str]]

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- printed by python benchmarks/table.py -->", "<!-- end -->"
# Further places of a page.
BEGIN_SAVINGS = "<!-- savings, printed by python benchmarks/table.py -->"
BEGIN_TRAINING = "<!-- training, printed by python benchmarks/table.py -->"
BEGIN_TRIALS = "<!-- trials, printed by python benchmarks/table.py -->"
_TARGETS = {
    "reference_over_cached": "≥ 3.0",
    "reference_over_uncached": "≥ 2.0",
    "compile_over_cached": "≥ 1.0",
    "cached_over_live_only": "≤ 1.15",
    "uncached_over_live_only": "≤ 1.4",
}
# The targets of a large model that differ; an empty string means no target.
_TARGETS_OF_LARGE = {"reference_over_cached": "≥ 2.0", "reference_over_uncached": ""}


def main() -> None:
    """Print the tables of `docs/performance.md`; with `--write`, also write the tables of all pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="also write the tables of all pages")
    arguments = parser.parse_args()
    print(render(arguments.results, TABLES))
    if arguments.write:
        for (page, begin), tables in PAGES.items():
            page.write_text(with_tables(page.read_text(), tables(arguments.results), begin))


def render(results: Path, tables: Tables) -> str:
    """Return the tables of all existing results as Markdown."""
    return "\n\n".join(tables[name](result) for name, result in _existing(results, tables).items())


def with_tables(page: str, tables: str, begin: str = BEGIN) -> str:
    """Return the page with `tables` between its two marker comments.

    Raises:
        SystemExit: a marker comment is missing.
    """
    before, mark, rest = page.partition(begin)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"the page has no place for the tables: add {begin} and {END}, each on a separate line")
    return f"{before}{begin}\n\n{tables}\n\n{END}{after}"


def tables_of(page: str, begin: str = BEGIN) -> str:
    """Return the text between the two marker comments of a page."""
    return page.partition(begin)[2].partition(END)[0].strip()


def contender_table(results: Path) -> str:
    """Return one table with a training step of each model: the time of each contender, and its ratio to `cached`."""
    steps = _existing(results, ("step", "step-real")).values()
    labels = {name: row["what"] for step in steps for name, row in step["contenders"].items()}
    rows = [(label, *(_with_ratio(step["contenders"], name) for step in steps)) for name, label in labels.items()]
    header = ("One training step: ms (relative to cached)", *map(_subject, steps))
    return f"{_markdown(header, rows)}\n\n{_where(*steps)}"


def savings_table(results: Path) -> str:
    """Return what two settings would save of a cached step of Wan2.1-1.3B's size, computed from measured times.

    Of the eight frozen evaluations of the denoiser in a cached step, all of which are assumed to take the same time,
    the settings save some. The live part does not change.
    """
    places = {"step-wan2.1-1.3b": "one H100, ms", "step-real": "two CPU cores, ms"}
    steps = {places[name]: result["contenders"] for name, result in _existing(results, places).items()}
    rows = []
    for setting, saved in (("the defaults", 0), ("`kl_steps: random:1`", 3), ("`policy: base`", 4), ("both", 7)):
        cells = [setting, str(saved)]
        for step in steps.values():
            cached, live = step["cached"], step["live_only"]
            time = cached["median_ms"] - saved / 8 * cached["stages_ms"]["denoiser"]
            cells += [f"{time:.0f}", f"{time / live['median_ms']:.2f}"]
        rows.append(tuple(cells))
    columns = [name for place in steps for name in (place, "relative to the live part")]
    return _markdown(("setting", "evaluations saved", *columns), rows)


def quantization_table(result: Result) -> str:
    """Return the table of the errors that each quantization format causes."""
    errors = result["error_against_bf16"]
    rows = [
        (
            f"`{name}`",
            *(f"{100 * error[f'{what}_relative_error']:.1f} %" for what in ("context", "velocity")),
            f"{error['loss_difference']:.4f}",
            f"{100 * error['gradient_relative_error']:.1f} %",
            f"{error['gradient_cosine']:.4f}",
        )
        for name, error in errors.items()
    ]
    loss = next(iter(errors.values()))["loss_of_bf16"]
    header = ("", "context", "velocity", f"loss ({loss:.3f} in bf16)", "gradient of the LoRA", "its cosine")
    return _markdown(header, rows)


def quantized_training_table(result: Result) -> str:
    """Return the table of training runs with each quantization format."""
    training = result["training"]
    rows = [
        (
            f"`{name}`",
            mean_and_deviation([run["before"] for run in runs], 3),
            mean_and_deviation([run["after"] for run in runs], 3),
            {True: "yes", False: "no", None: ""}[training["as_bf16"].get(name)],
        )
        for name, runs in training["runs"].items()
    ]
    header = ("", "score before", "score after", "within the spread of bf16")
    return f"{_markdown(header, rows)}\n\n{_where(result)}"


def trials_table(result: Result) -> str:
    """Return the changes that training with each setting made: mean and standard deviation over the seeds."""
    trials: dict[str, list[Result]] = {}
    for run in result["runs"].values():
        trials.setdefault(run["trial"], []).append(run)
    rows = [
        (
            f"`{trial}`",
            *(
                mean_and_deviation([run["gain"][measure] for run in runs], 4)
                for measure in ("face_score", "judge_face_dlib")
            ),
            mean_and_deviation([run["psnr"] for run in runs], 2),
            mean_and_deviation([run["kl_loss"] for run in runs], 3),
            f"{statistics.median(run['cpu_seconds'] for run in runs):.0f}",
        )
        for trial, runs in trials.items()
    ]
    header = ("setting", "face score", "judge (dlib)", "PSNR, dB", "KL loss at the end", "CPU s, whole run")
    return f"{_markdown(header, rows)}\n\n{_where(result)}"


def step_table(result: Result) -> str:
    """Return the tables of one training step: the time of each contender, and the ratios with their targets."""
    arguments = result["arguments"]
    targets = _TARGETS if arguments["model"] == "tiny" else {**_TARGETS, **_TARGETS_OF_LARGE}
    ratio_rows = [
        (name.replace("_", " "), f"{spread['median']:.2f}", _spread(spread), targets.get(name, ""))
        for name, spread in result["ratio_spread"].items()
    ]
    ratios = _markdown(("ratio", "median", "quartiles", "target"), ratio_rows)
    return f"{_contenders(result)}\n\n{ratios}\n\n{_where(result)}"


def checkpointing_table(result: Result) -> str:
    """Return the table of a cached step in each gradient checkpointing mode."""
    rows = [
        (name, f"{row['median_ms']:.0f}", f"{result['peak_growth_mib'][name]:.0f}")
        for name, row in result["milliseconds"].items()
    ]
    arguments = result["arguments"]
    title = (
        f"Gradient checkpointing, cached step of {arguments['model']}, {arguments['video']}, {arguments['precision']}"
    )
    return f"{_markdown((title, 'ms', 'peak MiB'), rows)}\n\n{_where(result)}"


def epochs_table(result: Result) -> str:
    """Return the table of two epochs, with and without precomputed frozen outputs."""
    rows = [
        (row["what"], f"{row['first_epoch_ms']:.0f}", f"{row['second_epoch_ms']:.0f}", f"{row['seconds']:.1f}")
        for row in result["contenders"].values()
    ]
    header = (f"Two epochs: {result['what']}", "ms a step, first epoch", "second epoch", "s, whole run")
    return f"{_markdown(header, rows)}\n\n{_where(result)}"


def faces_table(result: Result) -> str:
    """Return the table of the frames per second of scoring, from decoding to the score."""
    rows = [(name, f"{fps:.0f}") for name, fps in result["frames_per_second"]["whole path"].items()]
    title = f"Scoring a video: {result['what']}"
    return f"{_markdown((title, 'frames/s'), rows)}\n\n{_where(result)}"


def cold_table(result: Result) -> str:
    """Return the table of startup times."""
    rows = [(name, f"{row['median_ms'] / 1000:.2f}") for name, row in result["waits"].items()]
    return f"{_markdown(('From a cold start', 's'), rows)}\n\n{_where(result)}"


def scoring_table(result: Result) -> str:
    """Return the table of the frames per second of vision rewards, compared with scripts that use transformers."""
    rewards = result["rewards"]
    contenders = next(iter(rewards.values()))["frames_per_second"]
    rows = [(name, *(f"{reward['frames_per_second'][name]:.1f}" for reward in rewards.values())) for name in contenders]
    title = f"Frames per second, {result['what']}"
    return f"{_markdown((title, *rewards), rows)}\n\n{_where(result)}"


def window_table(result: Result) -> str:
    """Return the table of the cost of decoding a window of the clip, by the number of its latent frames."""
    windows = result["windows"]
    whole = max(windows, key=int)
    everything = windows[whole]["live_flop"]
    rows = [
        (
            f"{frames}{' (all)' if frames == whole else ''}",
            f"{cost['before_flop'] / 1e12:.0f} TFLOP",
            f"{cost['live_flop'] / 1e12:.0f} TFLOP",
            f"{(cost['before_flop'] + cost['live_flop']) / everything:.2f}",
            f"{cost['kept_bytes'] / 1e9:.1f} GB",
            f"{cost['peak_bytes'] / 1e9:.1f} GB",
        )
        for frames, cost in windows.items()
    ]
    title = f"Latent frames with gradient, {result['model']}, {result['video']}"
    header = (title, "before them, frozen", "forward and backward", "relative to the whole clip", "kept", "peak")
    return _markdown(header, rows)


def export_table(result: Result) -> str:
    """Return the table of time and memory of the export of a large denoiser."""
    size = sum(result["artifacts_gb"].values())
    row = (
        f"{result['precision']}, {result['backend']}",
        f"{result['seconds']:.0f} s",
        f"{result['seconds_by_phase']['trace denoiser']:.0f} s",
        f"{result['peak_memory_gib']:.1f} GiB",
        f"{size:.2f} GB",
        f"{max((case['max_abs'] for case in result['parity']), default=0):.1e}"
        if result["verified"]
        else "not run here",
    )
    title = f"Export of {result['parameters'] / 1e9:.2f} billion parameters"
    header = (title, "time", "of it tracing", "peak memory", "files", "largest difference from PyTorch")
    return f"{_markdown(header, [row])}\n\n{_where(result)}"


TABLES: Tables = {
    "step": step_table,
    "step-wan2.1-1.3b": step_table,
    "step-real": step_table,
    "epochs": epochs_table,
    "checkpointing": checkpointing_table,
    "faces": faces_table,
    "cold": cold_table,
}
# By page and begin of the place in it.
PAGES: Mapping[tuple[Path, str], Callable[[Path], str]] = {
    (ROOT / "README.md", BEGIN): contender_table,
    (ROOT / "docs" / "performance.md", BEGIN): partial(render, tables=TABLES),
    (ROOT / "docs" / "scoring.md", BEGIN): partial(render, tables={"scoring": scoring_table}),
    (ROOT / "docs" / "steps.md", BEGIN): partial(render, tables={"window": window_table}),
    (ROOT / "docs" / "steps.md", BEGIN_SAVINGS): savings_table,
    (ROOT / "docs" / "steps.md", BEGIN_TRIALS): partial(render, tables={"trials": trials_table}),
    (ROOT / "docs" / "quantization.md", BEGIN): partial(render, tables={"quantization": quantization_table}),
    (ROOT / "docs" / "quantization.md", BEGIN_TRAINING): partial(
        render, tables={"quantization": quantized_training_table}
    ),
    (ROOT / "docs" / "engines.md", BEGIN): partial(
        render,
        tables={
            "export-wan-1.3b-fp32-onnxruntime": export_table,
            "export-wan-1.3b-bf16-tensorrt-rtx": export_table,
        },
    ),
}


def _existing(results: Path, names: Iterable[str]) -> dict[str, Result]:
    paths = {name: results / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def _contenders(result: Result) -> str:
    contenders = result["contenders"]
    rows = [(row["what"], *_milliseconds_and_ratio(contenders, name)) for name, row in contenders.items()]
    return _markdown((f"One training step of {_subject(result)}", "ms", "relative to cached"), rows)


def _with_ratio(contenders: Mapping[str, Any], name: str) -> str:
    if name not in contenders:
        return "-"
    milliseconds, ratio = _milliseconds_and_ratio(contenders, name)
    return f"{milliseconds} ({ratio})"


def _milliseconds_and_ratio(contenders: Mapping[str, Any], name: str) -> tuple[str, str]:
    milliseconds = contenders[name]["median_ms"]
    return f"{milliseconds:.0f}", f"{milliseconds / contenders['cached']['median_ms']:.2f}"


def _subject(result: Result) -> str:
    arguments = result["arguments"]
    return f"{arguments['model']}, {arguments['video']}, {arguments['precision']}"


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return the mean and, of several values, the standard deviation, as text."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.{digits}f}{spread}"


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(spread: Mapping[str, float]) -> str:
    return f"{spread['quartile_1']:.2f} to {spread['quartile_3']:.2f}"


def _where(*results: Result) -> str:
    commits: dict[str, list[str]] = {}
    for machine in (result["machine"] for result in results):
        versions = ", ".join(
            f"{name} {machine['versions'][name]}"
            for name in ("torch", "onnxruntime-gpu", "openvino")
            if name in machine["versions"]
        )
        place = f"{machine['device']}, {machine['torch_threads']} threads; {versions}"
        commits.setdefault(place, []).append(machine["commit"])
    return "\n\n".join(f"{place}; commit {', '.join(dict.fromkeys(each))}." for place, each in commits.items())


if __name__ == "__main__":
    main()
