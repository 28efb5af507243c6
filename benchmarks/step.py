"""Time a training step: the reference, eager PyTorch, torch.compile, frostline uncached and cached, live part only.

    python benchmarks/step.py --model tiny --out benchmarks/results/step-tiny.json
    python benchmarks/step.py --model wan2.1-1.3b --device cuda --precision bf16 --video 1x17x3x256x256 \
        --backends aotinductor

- reference: unmodified functions of diffsynth, one sample at a time; faces are detected frame by frame with
  facenet-pytorch's MTCNN; all blocks are recomputed in backward; nothing is cached.
- eager: the whole batch at once, no recomputation, all in PyTorch; nothing is cached.
- compile: eager, with torch.compile on the denoiser's blocks, and on the face embedder if that is faster. The VAE
  is not compiled: its loop over frames with lists of caches is slower when compiled.
- uncached: frostline with the engines of its plan, without cached frozen outputs, as in the first epoch (`epochs.py`
  times whole epochs, with and without precomputing). `--torch-compile` sets `torch_compile` of frostline.
- cached: the same, with frozen outputs read from the cache, as in all later epochs.
- live_only: all frozen outputs are given, so that only the live part is computed, which engines cannot run.
- cached_window: cached, with `decode: {num_latent_frames: 1, position: last}`: the frames before the last latent frame
  are decoded without gradient, and only the last ones are rewarded. Its loss is defined differently, so it is not
  compared.

At batch size 1, torch's own fp32 Conv3d is several times slower than that of oneDNN. The first two contenders are
measured with both: torch's selection, and (`_onednn`) oneDNN at every batch size, as in frostline. All contenders start
from the same weights and noise. Losses and gradients are compared before times are measured: in fp32 with fixed
tolerances, in 16 bits with twice the largest change of eager's results if the LoRA weights change by up to one ulp.
Models with random weights generate no faces, so every frame is treated as having a face. All contenders use frostline's
face embedder, so its speedup over plain operations is not part of any ratio (see `live.py`).

All contenders in PyTorch share the weights of one module. `--build-apart` builds the engines in separate processes, one
after the other, so that the memory of tracing and verification is freed before times are measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from building import add_engine_arguments, add_shape_arguments, build_engines, engine_shapes
from contenders import CONTENDERS, ONEDNN, OTHER_LOSS, Contenders, Tolerance, compare, plain_copy
from measuring import RESULTS, interleave, machine, medians, peak_gib, peak_gpu_gib, ratio, summary, write_result
from rich.console import Console
from rich.table import Table
from shapes import DTYPES, TINY, WAN_1_3B, build_components, clips_of, spread_lora

from frostline.runtime.backends import TORCH
from frostline.runtime.engines.store import EngineStore
from frostline.train import WanTrainingModule
from frostline.train.step_settings import TrainingModuleSettings

# Ratios of times by name: (numerator, denominator).
RATIOS = {
    "reference_over_cached": ("reference", "cached"),
    "reference_over_uncached": ("reference", "uncached"),
    "reference_onednn_over_cached": ("reference_onednn", "cached"),
    "reference_onednn_over_uncached": ("reference_onednn", "uncached"),
    "eager_over_cached": ("eager", "cached"),
    "eager_over_uncached": ("eager", "uncached"),
    "compile_over_cached": ("compile", "cached"),
    "compile_over_uncached": ("compile", "uncached"),
    "cached_over_live_only": ("cached", "live_only"),
    "uncached_over_live_only": ("uncached", "live_only"),
    "cached_over_cached_window": ("cached", "cached_window"),
}
# Tolerance of losses and gradients in fp32. The tolerance in 16 bits depends on the model, and is measured.
_SAME_FP32 = Tolerance(loss=1e-3, cosine=0.999)


def main() -> None:
    """Measure, print a table and write JSON."""
    start = time.monotonic()
    arguments = _arguments()
    device = torch.device(arguments.device)
    left_out = arguments.without.split(",")
    names = [
        name for name in CONTENDERS if name not in left_out and (device.type == "cpu" or not name.endswith(ONEDNN))
    ]
    if arguments.precision == "fp32":
        # With TF32 (10 bits of mantissa) in cuDNN's convolutions, the results of the contenders would differ too much.
        torch.backends.cudnn.allow_tf32 = False
    if arguments.build_apart:
        _build_apart(arguments.backends)
    module, plain_vae = _build(arguments, device)
    batch = clips_of(arguments.video)
    result: dict[str, Any] = {"arguments": _plain(vars(arguments)), "machine": machine(device)}
    wanted = [name for name in module.stages if not arguments.stages or name in arguments.stages.split(",")]
    stages = [module.stages[name] for name in wanted if name != "vae_decoder"]  # it runs in PyTorch in training
    result["engines"] = build_engines(stages, arguments.backends, EngineStore(arguments.engines_dir))
    if arguments.build_only:
        return
    module.runtime.replan("auto")
    write_result(arguments.out, result)
    contenders = Contenders(
        module, plain_vae, batch, faces_everywhere=arguments.model != TINY, compiles="compile" in names
    )
    contenders.record_frozen()
    result["compiled"] = contenders.compiled
    outcomes = {name: contenders.outcome(name) for name in names}
    base = "eager_onednn" if "eager_onednn" in names else "eager"
    tolerance = _SAME_FP32 if arguments.precision == "fp32" else contenders.rounding_noise(base)
    result["tolerance"] = vars(tolerance)
    same = {name: outcome for name, outcome in outcomes.items() if name not in OTHER_LOSS}
    result["checks"] = checks = compare(same, base, tolerance)
    write_result(arguments.out, result)
    spans: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    steps = {name: contenders.timed_step(name, spans[name]) for name in names}
    # No warm-up is needed: each contender has already run for the comparison of results.
    samples = interleave(steps, arguments.rounds, device, warm_up=0)
    # The backends that were used at this shape; they are only known after the first step.
    result["plan"] = {name: vars(choice) for name, choice in module.runtime.plan.items()}
    Console(width=160).print(str(module.runtime.plan), highlight=False)
    rows = summary(samples)
    result["contenders"] = {
        name: {
            "what": CONTENDERS[name],
            **rows[name],
            "samples_ms": samples[name],
            "stages_ms": medians(spans[name]),
        }
        for name in names
    }
    for name, step in steps.items():
        result["contenders"][name]["peak_gpu_gib"] = peak_gpu_gib(step, device)
    pairs = {name: pair for name, pair in RATIOS.items() if set(pair) <= set(names)}
    result["ratio_spread"] = {name: ratio(samples, *pair) for name, pair in pairs.items()}
    result["ratios"] = {name: spread["median"] for name, spread in result["ratio_spread"].items()}
    result["seconds"] = time.monotonic() - start
    result["peak_memory_gib"] = peak_gib()
    write_result(arguments.out, result)
    _print(result)
    if strange := [name for name, check in checks.items() if not check["same"]]:
        raise SystemExit(f"{', '.join(strange)}: loss or gradient differ from {base}: the times are not comparable")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "--shape", choices=(TINY, WAN_1_3B), default=TINY)
    add_engine_arguments(parser)
    parser.add_argument("--stages", help="comma-separated stages to export; default: all")
    parser.add_argument("--build-apart", action="store_true", help="first build engines in separate processes")
    parser.add_argument("--build-only", action="store_true", help="build engines and measure nothing")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    add_shape_arguments(parser, "2x9x3x96x96")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--torch-compile", action="store_true", help="also compile the denoiser blocks of frostline's contenders"
    )
    parser.add_argument("--without", default="", help="contenders to leave out, comma-separated")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json")
    return parser.parse_args()


def _build_apart(backends: list[str]) -> None:
    """Run this command in a new process for each backend, with `--build-only`."""
    given = [argument for argument in sys.argv[1:] if argument != "--build-apart"]
    for backend in backends:
        subprocess.run([sys.executable, __file__, *given, "--backends", backend, "--build-only"], check=True)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that JSON supports; of paths only the last part, because the rest depends on the machine."""
    return {name: value.name if isinstance(value, Path) else value for name, value in values.items()}


def _build(arguments: argparse.Namespace, device: torch.device) -> tuple[WanTrainingModule, Any]:
    """Return the module, and a copy of its VAE without oneDNN convolutions."""
    settings = TrainingModuleSettings.parse(
        {
            "lora": {"rank": arguments.rank},
            "kl_weight": 0.2,
            "gradient_checkpointing": "none",
            "torch_compile": arguments.torch_compile,
            "rewards": [{"type": "face_identity", "upscale": 2 if arguments.model == TINY else 1}],
        }
    )
    components = build_components(arguments.model, DTYPES[arguments.precision], device)
    plain_vae = plain_copy(components)
    shapes = engine_shapes(arguments.video, arguments.fixed_shapes)
    module = WanTrainingModule(components, settings, plan=TORCH, engines=arguments.engines_dir, shapes=shapes)
    spread_lora(module)
    return module, plain_vae


def _print(result: Mapping[str, Any]) -> None:
    table = Table("contender", title="one training step")
    stages = sorted({stage for row in result["contenders"].values() for stage in row["stages_ms"]})
    for column in ("ms", *stages, "peak GPU GiB"):
        table.add_column(column, justify="right")
    for name, row in result["contenders"].items():
        peak = row["peak_gpu_gib"]
        cells = [f"{row['stages_ms'].get(stage, 0):.0f}" for stage in stages]
        table.add_row(name, f"{row['median_ms']:.0f}", *cells, "-" if peak is None else f"{peak:.1f}")
    console = Console(width=200)
    console.print(table)
    for name, spread in result["ratio_spread"].items():
        console.print(f"{name}: {spread['median']:.2f} ({spread['quartile_1']:.2f} to {spread['quartile_3']:.2f})")
    console.print(f"{result['seconds']:.0f} s, peak memory {result['peak_memory_gib']:.1f} GiB")


if __name__ == "__main__":
    main()
