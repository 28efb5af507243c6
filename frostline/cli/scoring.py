"""The command `frostline score`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frostline.cli.json_output import Json, print_json
from frostline.cli.lazy_options import Decorator, options_on_use
from frostline.cli.options import ENGINES, Device, EnginesDir, Rewards, RewardsFile, rewards_given
from frostline.cli.verbosity import progress
from frostline.errors import ConfigError
from frostline.terminal import Terminal, print_error

if TYPE_CHECKING:
    from frostline.score.settings import ScoreSettings


def _score_options() -> Decorator:
    from frostline.cli.settings_options import takes_settings
    from frostline.score.settings import ScoreSettings

    return takes_settings(ScoreSettings)


@options_on_use(_score_options)
def score(
    *,
    videos: Annotated[list[str] | None, typer.Argument(metavar="VIDEO…", help="Videos or pictures.")] = None,
    reward: Rewards = None,
    rewards_file: RewardsFile = None,
    reference: Annotated[str | None, typer.Option(help="Picture or video of the expected person or content.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt of all videos without a prompt in --pairs.")] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="CSV file with the columns video[,reference][,prompt], or the metadata.csv of a dataset."),
    ] = None,
    settings: ScoreSettings,
    backend: Annotated[
        str, typer.Option(help="auto, torch, or a backend whose engines are built if necessary.")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Number of frames a reward processes at once.")] = 32,
    out: Annotated[Path | None, typer.Option(help="Output file, .jsonl or .csv, with one row for each video.")] = None,
    report: Annotated[Path | None, typer.Option(help="HTML page with curves and pictures.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the results in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite the results in --out.")] = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[COLUMN=]NUMBER",
            help="Exit with code 1 if the mean of the first reward, or of the named column, is lower.",
        ),
    ] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Allow --pairs to name files outside its folder.")
    ] = False,
    device: Device = "auto",
    engines_dir: EnginesDir = ENGINES,
    as_json: Json = False,
) -> None:
    """Score videos with the rewards used in training, on batched engines.

    The default reward measures the similarity of the face to the reference.
    """
    from frostline.atomic_io import check_writable
    from frostline.score.request import gather_pairs

    if resume and out is None:
        raise ConfigError("--resume continues from the results in --out, which is not given")
    bars = _bars(fail_under or [])
    settings = settings.with_rewards(rewards_given(reward, rewards_file))
    _check_columns([column for column, _ in bars], settings.labels())
    wanted = gather_pairs(videos or [], reference, pairs, allow_outside, prompt, settings.needs())
    if report is not None:
        check_writable(report)
    from frostline.score.run import RunOptions, run_score
    from frostline.score.table import print_outcome

    options = RunOptions(out, resume, overwrite, backend, device, engines_dir, batch)
    outcome = run_score(wanted, settings, options, progress())
    if outcome is None:
        return
    if as_json:
        print_json(outcome.json_values())
    else:
        print_outcome(outcome, Terminal())
    if report is not None:
        from frostline.score.report import write_score_report

        write_score_report(report, outcome, settings)
    wrong = [shortfall for column, bar in bars if (shortfall := outcome.shortfall(bar, column)) is not None]
    if outcome.summary.failed:
        wrong.append(f"{outcome.summary.failed} of {outcome.summary.videos} videos could not be scored")
    if wrong:
        for problem in wrong:
            print_error(problem)
        raise typer.Exit(1)


def _check_columns(columns: Sequence[str], labels: Sequence[str]) -> None:
    """Check, before scoring, that each column belongs to a reward; metric names begin with the reward's name."""
    for column in columns:
        if column and not any(f"{column}_".startswith(f"{label}_") for label in labels):
            raise ConfigError(f"--fail-under {column}: no such score; valid columns: {', '.join(labels)}")


def _bars(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Parse pairs of column (empty for the first reward) and minimum mean."""
    bars = []
    for text in texts:
        column, _, number = text.rpartition("=")
        try:
            bars.append((column.strip(), float(number)))
        except ValueError:
            raise ConfigError(f"--fail-under {text!r}: must be a number, or COLUMN=NUMBER such as clip=0.3") from None
    return bars
