"""A run whose writing to its folder is killed a hundred times; started by test_killed_writes.py as a separate process.

    python killed_writes.py OUT SEED

Each attempt is a forked child that resumes like the trainer, with steps that compute nothing. The seed determines
whether it is killed by SIGKILL just before the nth change of the file system, or by SIGXFSZ in the middle of a file.
The folder is checked after each kill.
"""

import json
import os
import random
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from frostline.train.loop.checkpoint import find_checkpoints, latest_intact, rotate, write_checkpoint
from frostline.train.loop.output_dir import begins_in, check_start
from frostline.train.loop.resume import find_resume
from frostline.train.loop.run_dir import METRICS, REPORT, JsonLines, claimed, read_lines
from frostline.train.loop.trainer import RunOptions, _begin, _go_on
from frostline.train.report.page import write_report

KILLS, LIMIT = 100, 2
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link")


def fill(folder: Path, step: int) -> None:
    """Write a checkpoint that is large enough for a limit on the size of files to be reached in the middle of it."""
    (folder / "state.json").write_text(json.dumps({"step": step}))
    (folder / "optimizer.safetensors").write_bytes(bytes([step % 256]) * 20_000)
    (folder / "config.yaml").write_text("lora: {rank: 8}\n")


def line(step: int) -> dict[str, Any]:
    return {"step": step, "score": step / 100, "kl_loss": 0.1, "grad_norm": 1.0, "seconds": 0.5, "stages": {}}


def train(out: Path, steps: int, committed: int) -> None:
    """Run until `steps`; write the number of each step whose checkpoint is complete to the descriptor `committed`."""
    checkpoint = find_resume(out, "latest")
    options = RunOptions(resume=checkpoint, restart=True, config={"lora": {"rank": 8}})
    if begins_in(out, checkpoint):
        check_start(out, restart=True)
    with claimed(out):
        _begin(out, options) if begins_in(out, checkpoint) else _go_on(out, options)
        metrics = JsonLines(out / METRICS)
        for step in range(checkpoint.step + 1 if checkpoint else 1, steps + 1):
            metrics.append(line(step))
            metrics.sync()
            for _ in range(2 if step % 3 == 0 else 1):
                write_checkpoint(out, step, lambda folder, step=step: fill(folder, step))
                os.write(committed, f"{step}\n".encode())
            rotate(out, LIMIT)
            if step % 6 == 0:
                write_report(out)


def die_at(out: Path, number: int) -> None:
    """Kill this process at its nth change of a file in the folder."""
    left = iter(range(number))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(arguments[0]).startswith(str(out)) and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def attempt(out: Path, steps: int, moments: random.Random) -> tuple[int, int]:
    """Resume in a child until it ends or is killed; return its exit status and last complete checkpoint."""
    by_size, number, size = moments.random() < 0.2, moments.randrange(60), moments.randrange(20_000)
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if by_size:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            else:
                die_at(out, number)
            train(out, steps, sender)
            code = 0
        finally:
            os._exit(code)
    os.close(sender)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(receiver) as file:  # noqa: PTH123
        kept = [int(text) for text in file.read().split()]
    return status, max(kept, default=0)


def look(out: Path, kept: int) -> None:
    """Check what must be true after every kill."""
    latest = latest_intact(out) if out.exists() else None
    assert (latest.step if latest else 0) >= kept, f"step {kept} is lost"
    for checkpoint in find_checkpoints(out):
        checkpoint.verify()
    steps = [row["step"] for row in read_lines(out / METRICS)]
    assert steps[: latest.step if latest else 0] == list(range(1, latest.step + 1 if latest else 1)), steps
    if (out / REPORT).exists():
        assert (out / REPORT).read_text().rstrip().endswith("</html>")


def main() -> None:
    out, moments = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    ends: list[int] = []
    steps, kept = 1, 0
    while len(ends) < KILLS:
        status, last = attempt(out / "killed", steps, moments)
        kept = max(kept, last)
        look(out / "killed", kept)
        if status == 0:
            steps += moments.randrange(1, 8)
        else:
            ends.append(status)
    assert {*ends} == {-signal.SIGKILL, -signal.SIGXFSZ}, ends
    for name in ("killed", "whole"):
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            train(out / name, steps + 1, nowhere.fileno())
        write_report(out / name)
    print(steps + 1, *ends)


if __name__ == "__main__":
    main()
