"""Two runs, one undisturbed and one killed ten times; started by test_resume.py as a separate process.

    python killed_runs.py OUT SEED

Each attempt at the second run is a forked child that resumes from the latest checkpoint, until it is killed at a random
time, which depends on the seed. SIGKILL and SIGTERM alternate. The models are loaded before the children start.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from steps import Clips

from frostline.train import WanTrainingModule
from frostline.train.loop.resume import find_resume
from frostline.train.loop.trainer import RunOptions, train
from frostline.train.loop.validation import Validation, validate
from frostline.train.settings import TrainerSettings

STEPS, KILLS = 24, 10
SHARPNESS = {"type": "sharpness", "baseline": 0.0, "scale": 1.0}
SETTINGS = TrainerSettings(
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    lr_warmup_steps=3,
    max_train_steps=STEPS,
    per_device_train_batch_size=2,
    checkpointing_steps=2,
    save_total_limit=3,
)


def make_module(cache: Path) -> WanTrainingModule:
    """Return a module with fresh noise in every step, so that the state of the random generators matters."""
    torch.manual_seed(0)
    steps: dict[str, Any] = {"num_inference_steps": 3, "grad_start_step": 1, "grad_end_step": 2}
    return WanTrainingModule.from_pretrained(
        "tiny",
        engines=None,
        plan="torch",
        lora={"rank": 4},
        noise_seed=None,
        rewards=[SHARPNESS],
        cache_dir=cache,
        **steps,
    )


def run(module: WanTrainingModule, out: Path) -> int:
    """Resume the run from its latest checkpoint; return the exit code."""
    starts = Validation(Clips(), [0])
    options = RunOptions(
        resume=find_resume(out, "latest"),
        restart=True,
        validate=lambda step: validate(module, starts, step, out),
        validation_steps=5,
    )
    outcome = train(module, Clips(), SETTINGS, out, options)
    return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by


def attempt(module: WanTrainingModule, out: Path) -> int:
    """Start a child process that trains; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = run(module, out)
    finally:
        os._exit(code)


def lines(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def kill(child: int, out: Path, steps: int, seconds: float, how: signal.Signals) -> int:
    """Kill a child after `steps` more steps and some seconds; return its exit code."""
    target = lines(out) + steps
    while lines(out) < target and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(child, how)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    out, moments = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    torch.set_num_threads(1)
    whole, killed = out / "whole", out / "killed"
    modules = {folder: make_module(folder / "cache") for folder in (whole, killed)}
    assert os.waitpid(attempt(modules[whole], whole), 0)[1] == 0
    for number in range(KILLS):
        how = signal.SIGKILL if number % 2 else signal.SIGTERM
        child = attempt(modules[killed], killed)
        code = kill(child, killed, moments.choice((1, 2, 3)), moments.uniform(0, 0.3), how)
        print(how.name, code, lines(killed), flush=True)
    assert os.waitpid(attempt(modules[killed], killed), 0)[1] == 0


if __name__ == "__main__":
    main()
