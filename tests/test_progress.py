"""Progress bars and log lines on terminals of several widths, with and without colour, and without a terminal."""

import io
import logging
import re
from pathlib import Path

import pytest
from pseudo_terminal import on_terminal

from frostline import progress as progress_file
from frostline.progress import Progress
from frostline.terminal import Terminal

# The program ends when the test has seen the running bar.
BARS = """
import logging, pathlib, sys, time
from frostline.progress import Progress
from frostline.terminal.logs import log_to_console
log_to_console(logging.INFO)
log = logging.getLogger("frostline.test")
with Progress().task("load /a/folder/with/a/long/name/Wan2.2-I2V-A14B"):
    log.info("reading [%s]", "weights")
with Progress().bar("train the LoRA", 1000) as bar:
    bar.advance(710)
    for step in range(3):
        bar.describe(f"score 0.{step}12", "KL 0.0034", "1.2 s/step")
        bar.advance(1)
        log.warning("step %d: %s", step, "a sentence that takes more than one line of the terminal " * 3)
        print("printed", step)
    for _ in range(1000):
        if pathlib.Path("seen").exists():
            break
        time.sleep(0.02)
"""
RUNNING = re.compile(
    r".+train the LoRA +[━╸╺ ]*━[━╸╺ ]*  713/1000 \d:\d\d:\d\d ETA (\d|-):(\d\d|--):(\d\d|--) score 0\.212(.*)"
)


@pytest.mark.parametrize("colour", [True, False], ids=["colour", "no colour"])
@pytest.mark.parametrize(("columns", "parts"), [(80, ""), (100, ", KL 0.0034"), (120, ", KL 0.0034, 1.2 s/step")])
def test_bars_and_log_lines_share_a_screen(columns: int, parts: str, colour: bool, tmp_path: Path) -> None:
    running = set()

    def watch(lines: list[str]) -> None:
        for line in lines:
            if found := RUNNING.fullmatch(line):
                running.add(found[4])
                (tmp_path / "seen").touch()

    seen = on_terminal(
        *("-c", BARS), columns=columns, cwd=tmp_path, environment={} if colour else {"NO_COLOR": "1"}, watch=watch
    )
    assert seen.code == 0, seen.text
    assert running == {parts}
    said = "a sentence that takes more than one line of the terminal"
    # Each line is complete, and the bar is one line, below all messages.
    assert " ".join(" ".join(seen.lines).split()).count(said) == 9
    assert [line for line in seen.lines if line.startswith("printed")] == ["printed 0", "printed 1", "printed 2"]
    assert [line for line in seen.lines if "reading" in line] == ["reading [weights]"]
    assert [line for line in seen.lines if "train the LoRA" in line] == [seen.lines[-1]]
    assert "713/1000" in seen.lines[-1] and "score 0.212" in seen.lines[-1] and "ETA" not in seen.lines[-1]
    (loaded,) = (line for line in seen.lines if "load /a/" in line)
    assert re.fullmatch(r"✓ load /a/folder/with/a/lon… ━+ \d:\d\d:\d\d", loaded)
    assert bool(seen.colours) is colour


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING])
def test_the_console_shows_what_it_is_asked_for(level: int, tmp_path: Path) -> None:
    code = f"""
import logging
from frostline.terminal.logs import console_shows, log_to_console
log_to_console({logging.ERROR})
log_to_console({level})
for number in (10, 20, 30):
    logging.getLogger("frostline.test").log(number, "at %d", number)
logging.getLogger("another").info("no")
print([number for number in (10, 20, 30) if console_shows(number)])
"""
    seen = on_terminal("-c", code, cwd=tmp_path)
    expected = [(10, "debug: at 10"), (20, "at 20"), (30, "warning: at 30")]
    assert seen.lines[:-1] == [line for number, line in expected if number >= level]
    assert seen.lines[-1] == str([number for number, _ in expected if number >= level])


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_file, "_SECONDS_A_LINE", -1.0)
    log = io.StringIO()
    shown = Progress()
    shown.console = Terminal(file=log)
    with shown.bar("train the LoRA", 30) as bar:
        for step in (1, 2):
            bar.describe(f"score 0.{step}, [dim]", "word " * 50)
            bar.advance(1)
    with shown.task("load"):
        pass
    *running, last, loaded = log.getvalue().splitlines()
    assert [line.partition(", word")[0] for line in running] == [
        "train the LoRA: 1 of 30, score 0.1, [dim]",
        "train the LoRA: 2 of 30, score 0.2, [dim]",
    ]
    assert last.startswith("train the LoRA: 2 of 30 in 0:00:0"), "a bar that ends early must show how far it came"
    assert loaded.startswith("load: done in 0:00:0")


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True).task("load"):
        pass
    assert capsys.readouterr() == ("", "")
