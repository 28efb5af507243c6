"""`frostline score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frostline.cli.options import ENGINES, Device, EnginesDir
from frostline.cli.settings_options import takes_settings
from frostline.errors import ConfigError
from frostline.score.settings import ScoreSettings
from frostline.terminal import Terminal


@takes_settings(ScoreSettings)
def score(
    *,
    videos: Annotated[list[str] | None, typer.Argument(metavar="VIDEO…", help="Videos or pictures.")] = None,
    reference: Annotated[str | None, typer.Option(help="A picture or video of the person.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="CSV: video[,reference][,prompt], or a dataset's metadata.csv.")
    ] = None,
    settings: ScoreSettings,
    backend: Annotated[str, typer.Option(help="auto, torch, or one whose engines are built if need be.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Frames of one call of the detector.")] = 32,
    out: Annotated[Path | None, typer.Option(help="Results, .jsonl or .csv, one row a video.")] = None,
    report: Annotated[Path | None, typer.Option(help="One HTML page with curves and pictures.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the results in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in --out.")] = False,
    fail_under: Annotated[float | None, typer.Option(help="Exit with 1 if the mean score is lower.")] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Let --pairs name files outside its folder.")
    ] = False,
    device: Device = "auto",
    engines_dir: EnginesDir = ENGINES,
) -> None:
    """Score videos by how much their face is the reference's: the reward of training, on batched engines."""
    from frostline.atomic_io import check_writable
    from frostline.score.request import gather_pairs

    if resume and out is None:
        raise ConfigError("--resume goes on from the results in --out, which is missing")
    wanted = gather_pairs(videos or [], reference, pairs, allow_outside)
    if report is not None:
        check_writable(report)
    from frostline.progress import Progress
    from frostline.score.run import RunOptions, run_score
    from frostline.score.table import print_outcome

    options = RunOptions(out, resume, overwrite, backend, device, engines_dir, batch)
    outcome = run_score(wanted, settings, options, Progress())
    if outcome is None:
        return
    print_outcome(outcome, Terminal())
    if report is not None:
        from frostline.score.report import write_score_report

        write_score_report(report, outcome, settings)
    if outcome.summary.failed or (fail_under is not None and not outcome.summary.reaches(fail_under)):
        raise typer.Exit(1)
