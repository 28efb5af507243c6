"""Find the configuration of a run to resume from its folder, and the folder in which the run was started."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from frostline.errors import ConfigError
from frostline.train.loop.run_dir import CONFIG, LATEST, PROGRAM, RUN_FACTS, WORKING_DIR, read_facts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundRun:
    """A run to resume; all paths are absolute.

    Attributes:
        config: its configuration file.
        output_dir: the folder to write to, which may differ from that of the run.
        resume: see `find_resume`.
        started_in: the folder to which relative paths in the configuration refer; None if unknown or missing.
    """

    config: Path
    output_dir: Path
    resume: str
    started_in: Path | None

    def enter(self) -> None:
        """Change to the folder in which the run was started, so that relative paths have the same meaning."""
        if self.started_in is not None and self.started_in != Path.cwd():
            log.info("paths are relative to %s, where the run was started", self.started_in)
            os.chdir(self.started_in)


def find_run(resume: str, output_dir: Path | None = None) -> FoundRun:
    """Find the run for `--resume` if there is no configuration file.

    Args:
        resume: the folder of a run, or of one of its checkpoints; or `latest` or the name of a checkpoint in
            `output_dir` (the current folder if None).
        output_dir: the folder to write to; the folder of the run if None.
    Raises:
        ConfigError: there is no run.
    """
    path = Path(resume)
    if resume != LATEST and path.is_dir():
        inside = not _is_run(path) and _is_run(path.absolute().parent)
        folder, name = (path.absolute().parent, str(path.absolute())) if inside else (path, LATEST)
    else:
        folder, name = output_dir or Path(), resume
    if not _is_run(folder):
        where = folder.absolute() if folder == Path() else folder
        raise ConfigError(
            f"--resume {resume}: {where} is not a run folder (no {RUN_FACTS} and {CONFIG} of frostline): name "
            "the folder of a run, or a configuration file"
        )
    own = folder.resolve()
    return FoundRun(own / CONFIG, own if output_dir is None else output_dir.resolve(), name, _started_in(own))


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and PROGRAM in read_facts(folder)


def _started_in(folder: Path) -> Path | None:
    place = read_facts(folder).get(WORKING_DIR)
    return Path(place) if isinstance(place, str) and Path(place).is_dir() else None
