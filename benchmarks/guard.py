"""Measure the cost of checking, before each engine call, that the weights of the module have not changed.

    python benchmarks/guard.py --out benchmarks/results/guard.json

Uses a denoiser with 4 layers, like tiny, and one with 30 layers, like Wan2.1-1.3B. Both are narrow, because the cost
depends on the number of modules and tensors, not on their size. The digest of the weights, which is computed only if
they have changed, is measured at the same width.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffsynth.models.wan_video_dit import WanModel
from measuring import RESULTS, machine, write_result
from rich.console import Console
from rich.table import Table

from frostline.models.lora.inject import LoraSwitches, inject_lora, lora_parameters
from frostline.models.wan.denoiser import Denoiser
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.guard import LiveGuard, WeightGuard
from frostline.runtime.identity.fingerprint import weights_sha256
from frostline.runtime.stage import ModuleState, ModuleTensors, Network, Stage, TensorSpec

LAYERS = (4, 30)


class _Guarded(Stage):
    """A stage with the attributes that the guards read."""

    def module_state(self) -> ModuleState:
        return LoraSwitches(self.networks[0].module).conflict


def main() -> None:
    """Measure the times, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS / "guard.json")
    arguments = parser.parse_args()
    rows = [_measure(layers, arguments.calls) for layers in LAYERS]
    write_result(arguments.out, {"machine": machine(torch.device("cpu")), "rows": rows})
    table = Table("layers", "frozen tensors", "LoRA matrices", "frozen, µs", "LoRA and switches, µs", "digest, µs")
    for row in rows:
        table.add_row(*(f"{value:.0f}" for value in row.values()))
    Console().print(table)


def _measure(layers: int, calls: int) -> dict[str, float]:
    stage = _stage(layers)
    frozen, live = WeightGuard(stage), LiveGuard(stage)
    live.conflict()
    adapter = len(stage.networks[0].live)
    return {
        "layers": layers,
        "frozen_tensors": len([*stage.networks[0].module.parameters()]) - adapter,
        "live_tensors": adapter,
        "frozen_us": _median_us(frozen.holds, calls),
        "live_us": _median_us(live.conflict, calls),
        "digest_us": _median_us(lambda: weights_sha256(stage), 3),
    }


def _stage(layers: int) -> Stage:
    model = WanModel(
        dim=64, in_dim=36, ffn_dim=128, out_dim=16, text_dim=32, freq_dim=32, eps=1e-6, patch_size=(1, 2, 2),
        num_heads=2, num_layers=layers, has_image_input=False, require_clip_embedding=False,
    )  # fmt: skip
    inject_lora(model.requires_grad_(False), rank=4)
    adapter = lora_parameters(model)
    specs = tuple(TensorSpec(name, tuple(matrix.shape), matrix.dtype) for name, matrix in adapter.items())
    live = ModuleTensors(model, {name: name for name in adapter})
    network = Network("denoiser", Denoiser(model), (), ("velocity",), live, specs)
    return _Guarded(name="denoiser", model="narrow", networks=(network,), tolerance=Tolerance(0, 0, 1))


def _median_us(look: Callable[[], object], calls: int) -> float:
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        look()
        samples.append(1e6 * (time.perf_counter() - start))
    return statistics.median(samples)


if __name__ == "__main__":
    main()
