"""Export a denoiser of the size of Wan2.1-T2V-1.3B with random weights; measure time, file sizes, memory and parity.

    python benchmarks/export_wan_1_3b.py --precision bf16 --backend tensorrt-rtx
    python benchmarks/export_wan_1_3b.py --precision fp32 --backend onnxruntime

Each run is one process, so that its peak memory is that of one export. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, machine, peak_gib, write_result
from shapes import DENOISER, DTYPES, face_stages, random_denoiser

from frostline.config import LoraSettings
from frostline.export.exporter import export_stage
from frostline.models.checkpoints.loading import load_components
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.engines.store import EngineStore
from frostline.stages.shapes import parse_shapes
from frostline.stages.staged_model import stage_model
from frostline.stages.wan.family import video_model


def main() -> None:
    """Run one export and write its measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--compute-capability", default="8.9")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--engines-dir", type=Path, help="engine store; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.engines_dir) as folder:
        result = _export(arguments, arguments.engines_dir or Path(folder))
    out = arguments.out or RESULTS / f"export-wan-1.3b-{arguments.precision}-{arguments.backend}.json"
    write_result(out, result)
    print(json.dumps(result, indent=2))


def _export(arguments: argparse.Namespace, engines: Path) -> dict[str, Any]:
    dtype = DTYPES[arguments.precision]
    tiny = load_components("tiny", dtype)
    spec = replace(tiny.spec, name="wan-1.3b-shaped", networks={**tiny.spec.networks, "denoiser": DENOISER})
    shapes = parse_shapes("video:1x1x3x64x64", "video:1x5x3x64x64", "video:2x81x3x832x832")
    staged = stage_model(
        video_model(replace(tiny, spec=spec, denoiser=random_denoiser(dtype)), LoraSettings(rank=arguments.rank)),
        face_stages(shapes),
        shapes,
    )
    loaded = peak_gib()
    start = time.monotonic()
    steps: list[tuple[str, float]] = []
    exported = export_stage(
        staged.stages["denoiser"],
        arguments.backend,
        EngineStore(engines),
        options=BuildOptions(compute_capabilities=(arguments.compute_capability,)),
        progress=lambda step: steps.append((step, time.monotonic() - start)),
    )
    seconds = time.monotonic() - start
    manifest = exported.manifest
    return {
        "model": "Wan2.1 1.3B shape (see benchmarks/shapes.py), random weights",
        "parameters": sum(p.numel() for p in staged.model.experts[-1].network.parameters()),
        "precision": arguments.precision,
        "backend": arguments.backend,
        "device": manifest.device,
        "seconds": round(seconds, 1),
        "seconds_by_phase": _seconds_by_phase(steps, seconds),
        "peak_memory_gib_before_export": round(loaded, 2),
        "peak_memory_gib": round(peak_gib(), 2),
        "artifacts_gb": {name: round(part.bytes / 1e9, 3) for name, part in manifest.artifacts.items()},
        "verified": manifest.verified,
        "parity": [measured.model_dump() for measured in manifest.parity],
        "latency_ms": manifest.latency_ms,
        "machine": machine(torch.device("cpu")),
    }


def _seconds_by_phase(steps: list[tuple[str, float]], end: float) -> dict[str, float]:
    """Return the seconds of each phase of an export; the numbered steps of TensorRT (`phase 3/607`) are added up.

    Args:
        steps: the progress messages, and their times in seconds.
        end: the end of the export in seconds.
    """
    phases: dict[str, float] = {}
    ends = [begin for _, begin in steps[1:]] + [end]
    for (step, begin), finish in zip(steps, ends, strict=True):
        name = re.sub(r" \d+/\d+$", "", step)
        phases[name] = phases.get(name, 0.0) + finish - begin
    return {name: round(seconds, 1) for name, seconds in phases.items() if seconds >= 0.1}


if __name__ == "__main__":
    main()
