"""Runs of a small model with two experts whose frozen outputs are precomputed; as a script, one that is killed.

    python precomputing.py FOLDER SEED

Precomputing into FOLDER/killed is killed ten times, at random times that depend on the seed. FOLDER/log lists the
entries that it put into the cache, one per line.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from frostline.models.checkpoints import checkpoint_files
from frostline.models.tiny.clips import held_out_clips
from frostline.progress import Progress
from frostline.runtime.cache import FrozenOutputCache
from frostline.train.launch import open_validation
from frostline.train.precompute.prepare import Precomputed, precompute
from frostline.train.settings import RunSettings
from frostline.video import write_video

KILLS = 10
_WEIGHTS = Path(checkpoint_files.__file__).parents[1] / "tiny" / "weights"


def write_model(folder: Path) -> Path:
    """Copy tiny-moe in the layout of Wan's releases with two experts."""
    shared, high = _WEIGHTS / "tiny", _WEIGHTS / "tiny-moe" / "high_noise_model"
    shutil.copytree(high, folder / "high_noise_model")
    (folder / "low_noise_model").mkdir()
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        shutil.copy(shared / name, folder / "low_noise_model" / name)
    for name in ("Wan2.1_VAE.safetensors", "models_t5_umt5-xxl-enc.safetensors"):
        shutil.copy(shared / name, folder / name)
    shutil.copytree(shared / "google", folder / "google")
    return folder


def write_clips(folder: Path, count: int = 5) -> Path:
    """Write clips with captions; two captions are equal."""
    folder.mkdir()
    clips = held_out_clips(count, seed=2, num_frames=5, size=32)
    for index, (video, prompt) in enumerate(zip(clips.video, clips.prompts, strict=True)):
        write_video(folder / f"{index}.mp4", video, fps=8, lossless=True)
        (folder / f"{index}.txt").write_text(clips.prompts[0] if index == 1 else prompt)
    return folder


def run_settings(folder: Path, name: str, **others: Any) -> RunSettings:
    """Return the settings of a run in `folder`, which contains `model` and `data`; two of three steps are frozen."""
    cut = {"source": folder / "data", "num_frames": 5, "height": 32, "width": 32}
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "device": "cpu",
        "output_dir": folder / name,
        "num_inference_steps": 3,
        "grad_start_step": 2,
        "grad_end_step": 2,
        "lora": {"rank": 2},
        "plan": {"backend": "torch"},
        "rewards": [{"type": "sharpness", "baseline": 0, "scale": 1}],
        "sft_weight": 0.1,
        "data": cut,
        "validation": {**cut, "num_videos": 3, "steps": 2, "batch_size": 2},
        "train": {"learning_rate": 1e-2, "max_train_steps": 3, "per_device_train_batch_size": 2},
    }
    return RunSettings.parse({**settings, **others})


def precompute_for(settings: RunSettings, batch_size: int | None = None) -> Precomputed:
    """Precompute like a run."""
    cpu, quiet = torch.device("cpu"), Progress(quiet=True)
    return precompute(settings, settings.data.open(), open_validation(settings), cpu, quiet, batch_size=batch_size)


def _attempt(settings: RunSettings, log: Path) -> int:
    """Start a child that precomputes, and logs the entries that it put into the cache; return its process id."""
    child = os.fork()
    if child:
        return child
    code, put = 1, FrozenOutputCache.put_batch

    def logged(cache: FrozenOutputCache, entries: Any) -> None:
        put(cache, entries)
        with log.open("a") as file:
            file.write("".join(f"{key}\n" for key in entries))

    try:
        FrozenOutputCache.put_batch = logged  # type: ignore[method-assign]
        precompute_for(settings)
        code = 0
    finally:
        os._exit(code)


def _lines(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


def main() -> None:
    folder, moments = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    torch.set_num_threads(1)
    log = folder / "log"
    settings = run_settings(folder, "killed", precompute="always")
    for number in range(KILLS):
        child, target = _attempt(settings, log), _lines(log) + moments.choice((0, 1, 2))
        while _lines(log) < target and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.5 if number % 3 == 0 else 0.03))
        os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), _lines(log), flush=True)
    assert os.waitpid(_attempt(settings, log), 0)[1] == 0


if __name__ == "__main__":
    main()
