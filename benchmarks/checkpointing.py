"""Compare the gradient checkpointing modes, with the first forward in PyTorch and on the engines of the plan.

    python benchmarks/checkpointing.py --out benchmarks/results/checkpointing.json

Measures the forward and backward of cached steps, alternating between the contenders, and the peak memory of each. Loss
and gradient of all contenders are compared first. Without recomputation, there is no separate first forward.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from building import add_engine_arguments, add_shape_arguments, build_engines, engine_shapes
from contenders import Outcome, Tolerance, compare, flat_gradient
from measuring import RESULTS, interleave, machine, peak_growth_mib, ratio, summary, write_result
from rich.console import Console
from rich.table import Table
from shapes import DTYPES, TINY, WAN_1_3B, build_components, clips_of, reward_faces_everywhere, spread_lora

from frostline.config import GradientCheckpointing
from frostline.runtime.backends import TORCH
from frostline.runtime.engines.store import EngineStore
from frostline.train import WanTrainingModule
from frostline.train.step_settings import TrainingModuleSettings

# By name: the checkpointing mode, and whether the first forward, which backward recomputes, runs on engines.
CONTENDERS: Mapping[str, tuple[GradientCheckpointing, bool]] = {
    "none": ("none", False),
    "block, torch first": ("block", False),
    "block, engines first": ("block", True),
    "full, torch first": ("full", False),
    "full, engines first": ("full", True),
}
_SAME = Tolerance(loss=1e-3, cosine=0.999)


def main() -> None:
    """Compare the results, measure the times, print a table and write JSON."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    settings = TrainingModuleSettings.parse(
        {
            "lora": {"rank": 8},
            "kl_weight": 0.2,
            "gradient_checkpointing": "none",
            "rewards": [{"type": "face_identity", "upscale": 2}],
        }
    )
    module = WanTrainingModule(
        build_components(arguments.model, DTYPES[arguments.precision], device),
        settings,
        plan=TORCH,
        engines=arguments.engines_dir,
        shapes=engine_shapes(arguments.video, arguments.fixed_shapes),
    )
    if arguments.model != TINY:
        reward_faces_everywhere(module)
    build_engines(module.stages.values(), arguments.backends, EngineStore(arguments.engines_dir))
    module.runtime.replan("auto")
    data = clips_of(arguments.video)
    spread_lora(module)
    steps = {name: _step(module, data, *how) for name, how in CONTENDERS.items()}
    checks = compare({name: _outcome(module, step) for name, step in steps.items()}, "none", _SAME)
    samples = interleave(steps, arguments.rounds, device)
    result = {
        "arguments": {"model": arguments.model, "video": arguments.video, "precision": arguments.precision},
        "machine": machine(device),
        "checks": checks,
        "plan": {name: choice.backend for name, choice in module.runtime.plan.items()},
        "milliseconds": summary(samples),
        "samples_ms": samples,
        "peak_growth_mib": {name: peak_growth_mib(step, device) for name, step in steps.items()},
        "torch_over_engines": {
            kind: ratio(samples, f"{kind}, torch first", f"{kind}, engines first") for kind in ("block", "full")
        },
    }
    write_result(arguments.out, result)
    _print(result)
    if strange := [name for name, check in checks.items() if not check["same"]]:
        raise SystemExit(f"{', '.join(strange)}: loss or gradient differ from 'none': the times are not comparable")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "--shape", choices=(TINY, WAN_1_3B), default=TINY)
    add_engine_arguments(parser)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    add_shape_arguments(parser, "2x9x3x96x96")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpointing.json")
    return parser.parse_args()


def _step(module: WanTrainingModule, data: Mapping[str, Any], kind: GradientCheckpointing, engines_first: bool) -> Any:
    def step() -> tuple[float, float, float]:
        module.zero_grad()
        module.checkpoint(kind)
        module.settings = module.settings.model_copy(update={"engine_forward": engines_first})
        loss, face_score, kl_loss = module(data)
        loss.backward()
        return loss.item(), face_score.item(), kl_loss.item()

    return step


def _outcome(module: WanTrainingModule, step: Any) -> Outcome:
    loss, face_score, kl_loss = step()
    return Outcome(loss, face_score, kl_loss, flat_gradient(module))


def _print(result: Mapping[str, Any]) -> None:
    table = Table("gradient checkpointing", "ms", "quartiles", "peak MiB", "1 - cosine of the gradient")
    for name, row in result["milliseconds"].items():
        spread = f"{row['quartile_1_ms']:.0f} to {row['quartile_3_ms']:.0f}"
        cosine = result["checks"][name]["gradient_cosine"]
        table.add_row(
            name, f"{row['median_ms']:.0f}", spread, f"{result['peak_growth_mib'][name]:.0f}", f"{1 - cosine:.1e}"
        )
    console = Console(width=140)
    console.print(table)
    for kind, spread in result["torch_over_engines"].items():
        span = f"{spread['quartile_1']:.2f} to {spread['quartile_3']:.2f}"
        console.print(f"{kind}: torch first over engines first {spread['median']:.2f} ({span})")
    console.print(str(result["plan"]), highlight=False)


if __name__ == "__main__":
    main()
