"""The command `frostline score`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frostline.cli.json_output import Json, print_json
from frostline.cli.lazy_options import Decorator, options_on_use
from frostline.cli.options import ENGINES, Device, EnginesDir, RayAddress, Rewards, RewardsFile, rewards_given
from frostline.cli.verbosity import progress
from frostline.errors import ConfigError
from frostline.paths import is_url
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
        str | None,
        typer.Option(
            metavar="FILE",
            help="CSV file with the columns video[,reference][,prompt], or the metadata.csv of a dataset; with --ray "
            "also JSON Lines, Parquet and URLs.",
        ),
    ] = None,
    settings: ScoreSettings,
    backend: Annotated[
        str, typer.Option(help="auto, torch, or another backend; missing engines of that backend are built.")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Number of frames per batch.")] = 32,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Output file, .jsonl or .csv, with one row for each video; with --ray also .parquet and URLs.",
        ),
    ] = None,
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
    max_download_size: Annotated[
        float, typer.Option(min=0.001, metavar="MB", help="Maximum size of a video at a URL, in MB.")
    ] = 4000.0,
    download_timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Time limit for downloading a video at a URL.")
    ] = 600.0,
    device: Device = "auto",
    engines_dir: EnginesDir = ENGINES,
    ray: RayAddress = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: number of workers; default: as many as the cluster allows.")
    ] = None,
    cpus_per_worker: Annotated[float, typer.Option(min=0.0, help="With --ray: CPUs per worker.")] = 1.0,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="With --ray: GPUs per worker, such as 0.5; default: 1 if the cluster has GPUs, otherwise 0."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score videos with the same rewards as training, in batches on compiled engines.

    The default reward measures the similarity of the face to the reference.
    """
    from frostline.atomic_io import check_writable

    if resume and out is None:
        raise ConfigError("--resume needs --out: the results file to continue from")
    bars = _bars(fail_under or [])
    settings = settings.with_rewards(rewards_given(reward, rewards_file))
    _check_columns([column for column, _ in bars], settings.labels())
    if report is not None:
        check_writable(report)
    from frostline.video.downloads import DownloadLimits

    shared: dict[str, Any] = {
        "resume": resume,
        "overwrite": overwrite,
        "backend": backend,
        "device": device,
        "engines": engines_dir,
        "batch": batch,
        "downloads": DownloadLimits(max_download_size, download_timeout),
    }
    if ray is not None:
        from frostline.cluster.session import ClusterOptions, require_ray

        require_ray()
        if out is None:
            raise ConfigError("--ray needs --out: the results file of all workers")
        from frostline.cluster.pair_files import PairSource
        from frostline.cluster.score_run import ClusterRun, score_on_cluster

        source = PairSource(tuple(videos or ()), reference, pairs, allow_outside, prompt, settings.needs())
        cluster = ClusterOptions(ray, workers, cpus_per_worker, gpus_per_worker)
        run = ClusterRun(out=out, cluster=cluster, **shared)
        outcome = score_on_cluster(source, settings, run, progress())
    else:
        from frostline.score.request import gather_pairs
        from frostline.score.run import RunOptions, run_score

        file, results = _local(pairs, "--pairs"), _local(out, "--out")
        wanted = gather_pairs(videos or [], reference, file, allow_outside, prompt, settings.needs())
        options = RunOptions(out=results, **shared)
        outcome = run_score(wanted, settings, options, progress())
    if outcome is None:
        return
    from frostline.score.table import print_outcome

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


def _local(name: str | None, flag: str) -> Path | None:
    if name is not None and is_url(name):
        raise ConfigError(f"{flag} {name}: a URL needs --ray")
    return None if name is None else Path(name)


def _check_columns(columns: Sequence[str], labels: Sequence[str]) -> None:
    """Check, before scoring, that each column belongs to a reward; metric names begin with the reward's name."""
    for column in columns:
        if column and not any(f"{column}_".startswith(f"{label}_") for label in labels):
            raise ConfigError(f"--fail-under {column}: no such score; valid columns: {', '.join(labels)}")


def _bars(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Parse the values of `--fail-under` into pairs of column (empty for the first reward) and minimum mean."""
    bars = []
    for text in texts:
        column, _, number = text.rpartition("=")
        try:
            bars.append((column.strip(), float(number)))
        except ValueError:
            raise ConfigError(f"--fail-under {text!r}: must be a number, or COLUMN=NUMBER such as clip=0.3") from None
    return bars
