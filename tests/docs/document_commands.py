"""Fenced commands of documents: extracting them, and checking them without running them.

An HTML comment `<!-- not run: REASON -->` before a block says why no test runs it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.exceptions import TyperException

from frostline.cli import app
from frostline.errors import FrostlineError
from frostline.recipes import training_config
from frostline.train.config_file import load_run_settings

ROOT = Path(__file__).parents[2]
REASONS = ("installs packages", "needs a GPU", "needs real weights", "needs real weights and a GPU", "takes minutes")
COMMANDS, PYTHON = "bash", "python"
# Languages of blocks that are not commands.
OTHERS = {"text", "yaml", "json", "csv", "bibtex"}
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]*?) -->\n)?^(?P<fence>```+)(?P<language>\w*)\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_VARIABLE = re.compile(r"\w+=\S*")
# Placeholders for what the reader fills in.
_ELLIPSIS = {"…", "..."}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: the language after the fence.
        text: the lines of the block.
        reason: why it is not run; None if it is run.
    """

    language: str
    text: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """Return all fenced blocks of a page."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["language"], match["text"], match["reason"]) for match in found]


def commands(text: str) -> Iterator[list[str]]:
    """Split a block of shell commands into the words of each command."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((index for index, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
            command = words[:end]
            while command and _VARIABLE.fullmatch(command[0]):
                command.pop(0)
            if command:
                yield command
            words = words[end + 1 :]


def problem(command: list[str]) -> str | None:
    """Return what is wrong with a command, as far as it can be found without running it; None if nothing is."""
    program, *arguments = command
    if program in ("accelerate", "torchrun") and "-m" in arguments:
        program, *arguments = arguments[arguments.index("-m") + 1 :]
    if program == "frostline":
        return _problem_of_frostline(arguments)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        missing = [target for target in arguments if target not in targets and "=" not in target]
        return f"no target {missing[0]}" if missing else None
    if program == "pip":
        return _problem_of_pip(arguments)
    if program == "python" and arguments and arguments[0].startswith(("benchmarks/", "docs/")):
        return None if (ROOT / arguments[0]).is_file() else f"no file {arguments[0]}"
    return None


def _problem_of_frostline(arguments: list[str]) -> str | None:
    """Parse the arguments as the command line does, and the overrides as a run does."""
    command: Any = typer.main.get_command(app)
    context: Any = None
    name = command.name
    abridged = bool(_ELLIPSIS & {*arguments})
    arguments = [argument for argument in arguments if argument not in ("--verbose", *_ELLIPSIS)]
    try:
        while hasattr(command, "get_command") and arguments and not arguments[0].startswith("-"):
            context = command.make_context(command.name, arguments, parent=context, resilient_parsing=True)
            name, command, arguments = command.resolve_command(context, arguments)
            if command is None:
                return "No such command"
        if not {"--help", "--version"} & {*arguments} and not hasattr(command, "get_command"):
            context = command.make_context(command.name, arguments, parent=context)
            if name in ("train", "cache"):
                _check_overrides(context.params)
    except (TyperException, FrostlineError) as error:
        if type(error).__name__ == "MissingParameter":
            return None if abridged else "missing parameter"
        return getattr(error, "message", str(error))
    return None


def _check_overrides(values: dict[str, object]) -> None:
    config, overrides = values.get("config"), values.get("overrides")
    if config is not None and "=" in str(config):  # an override without a configuration file
        config, overrides = None, [str(config), *(overrides if isinstance(overrides, list | tuple) else [])]
    known = training_config(Path(str(config)).stem) if config else None
    load_run_settings(known, [str(override) for override in overrides] if isinstance(overrides, list | tuple) else [])


def _problem_of_pip(arguments: list[str]) -> str | None:
    extras = re.search(
        r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert extras is not None
    known = re.findall(r"^([\w-]+) = ", extras[1], re.MULTILINE)
    asked = [
        extra for argument in arguments for named in re.findall(r"\[(.*)\]", argument) for extra in named.split(",")
    ]
    unknown = [extra for extra in asked if extra not in known]
    return f"no extra {unknown[0]}" if unknown else None
