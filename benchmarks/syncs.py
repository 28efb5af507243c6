"""Find the places of a step that read values of tensors: on a GPU, the host waits there for all previous work.

    python benchmarks/syncs.py --out benchmarks/results/syncs.json

Runs forward and backward of one cached training step in torch's profiler. Counts the operators that copy values to the
host, or need them to determine the size of their result, by the line of frostline that calls them. On a CPU, these
operators cost nothing, but the places are the same, except that `tolist` is not recorded. The values of the noise
schedule are on the host on all devices, so the places in `schedule.py` and `rollout.py` cause no waiting.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from building import add_engine_arguments, build_engines
from measuring import RESULTS, machine, write_result
from rich.console import Console
from rich.table import Table
from shapes import TINY, build_components
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from frostline.models.tiny.clips import held_out_clips
from frostline.runtime.engines.store import EngineStore
from frostline.train import WanTrainingModule
from frostline.train.step_settings import TrainingModuleSettings

# `item`, `float()` and `if tensor:` call the first operator; results whose size depends on a mask need the others.
OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")


def main() -> None:
    """Trace a step, print a table and write JSON."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    settings = TrainingModuleSettings.parse({"lora": {"rank": 8}, "rewards": [{"type": "face_identity", "upscale": 2}]})
    module = WanTrainingModule(build_components(TINY, torch.float32, device), settings, engines=arguments.engines_dir)
    stages = [stage for stage in module.stages.values() if stage.name != "vae_decoder"]
    build_engines(stages, arguments.backends, EngineStore(arguments.engines_dir))
    module.runtime.replan("auto")
    clips = held_out_clips(2, seed=0)
    data = {"prompt": clips.prompts, "video": clips.video}
    for _ in range(2):  # the first step fills the cache, and measures the latencies that `auto` needs
        module(data)[0].backward()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    config = _ExperimentalConfig(verbose=True)  # stacks are empty without it
    with profile(activities=activities, with_stack=True, experimental_config=config) as trace:
        module(data)[0].backward()
    places = count_places((event.name, event.stack) for event in trace.events() or ())
    result = {"machine": machine(device), "places": [[name, place, count] for (name, place), count in places]}
    write_result(arguments.out, result)
    if arguments.trace:
        trace.export_chrome_trace(str(arguments.trace))
    table = Table("operator", "from", "calls per step")
    for (name, place), count in places:
        table.add_row(name, place, str(count))
    Console(width=140).print(table, f"{sum(count for _, count in places)} in total")


def count_places(events: Iterable[tuple[str, list[str]]]) -> list[tuple[tuple[str, str], int]]:
    """Count the calls of each operator of `OPERATORS` by calling line, the most frequent first.

    Args:
        events: name and stack, innermost frame first, as `path(line): function`.
    """
    counts = Counter((name, _place(stack)) for name, stack in events if name in OPERATORS)
    return counts.most_common()


def _place(stack: list[str]) -> str:
    """Return the innermost frame in frostline; without one, the innermost frame."""
    own = (frame for frame in stack if frame.startswith("frostline/"))  # relative to sys.path
    return next(own, next(iter(stack), "unknown"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trace", type=Path, help="also write the whole trace, for chrome://tracing")
    parser.add_argument("--out", type=Path, default=RESULTS / "syncs.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
