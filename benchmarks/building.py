"""The engines that benchmarks run: built once, in one store that all of them share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console

from frostline.errors import EngineError
from frostline.export.exporter import export_stage
from frostline.runtime.backends import get_backend
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.stage import Stage
from frostline.stages.shapes import ShapeRange, parse_shapes

ENGINES = Path(__file__).parents[1] / "runs" / "bench" / "engines"
BACKENDS = "onnxruntime,openvino"


def add_engine_arguments(parser: argparse.ArgumentParser, backends: str = BACKENDS) -> None:
    """`--backends` and `--engines-dir`, as every benchmark has them."""
    parser.add_argument(
        "--backends", type=_names, default=backends, help="comma-separated; those not installed drop out"
    )
    parser.add_argument("--engines-dir", type=Path, default=ENGINES, help="where engines are built and looked for")


def add_shape_arguments(parser: argparse.ArgumentParser, video: str) -> None:
    """`--video` and `--fixed-shapes`, where engines are built around one shape."""
    parser.add_argument("--video", default=video, help="BxTx3xHxW that engines are built around")
    parser.add_argument("--fixed-shapes", action="store_true", help="and serve alone: compilers have less to do")


def engine_shapes(video: str, fixed: bool, faces: int | None = None) -> ShapeRange:
    """What engines are built around, a video and so many faces.

    Args:
        fixed: no other video is served; of faces and their crops there are never equally many.
    """
    shape = f"video:{video}"
    bound = shape if fixed else ""
    return parse_shapes(bound, shape if faces is None else f"{shape},faces:{faces}x3x112x112", bound)


def build_engines(stages: Iterable[Stage], backends: Iterable[str], store: EngineStore) -> dict[str, dict[str, str]]:
    """Engines of all `stages` on all `backends`, built where they are missing; what came of each, in words.

    What cannot be built is told and left to torch.
    """
    outcome: dict[str, dict[str, str]] = {}
    for stage in stages:
        for backend in backends:
            start = time.monotonic()
            try:
                exported = export_stage(stage, backend, store)
                said = exported.unverified or f"verified, {_latencies(exported.manifest.latency_ms)}"
            except EngineError as error:
                said = str(error)[:300]
            said = f"{time.monotonic() - start:.0f} s: {said}"
            outcome.setdefault(stage.name, {})[backend] = said
            Console(stderr=True).print(f"{stage.name} {backend}: {said}", highlight=False)
    return outcome


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name and get_backend(name).unavailable() is None]


def _latencies(latency_ms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {milliseconds:.2f} ms" for name, milliseconds in latency_ms.items())
