"""Build the engines of the benchmarks once, in a store that most benchmarks share."""

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
    """Add the options `--backends` and `--engines-dir`, which several benchmarks share."""
    parser.add_argument(
        "--backends", type=_names, default=backends, help="comma-separated; backends that are not installed are skipped"
    )
    parser.add_argument("--engines-dir", type=Path, default=ENGINES, help="folder of the engine store")


def add_shape_arguments(parser: argparse.ArgumentParser, video: str) -> None:
    """Add the options `--video` and `--fixed-shapes`, for engines that are built for one shape."""
    parser.add_argument("--video", default=video, help="shape BxTx3xHxW that engines are optimized for")
    parser.add_argument("--fixed-shapes", action="store_true", help="build engines for this shape only")


def engine_shapes(video: str, fixed: bool, faces: int | None = None) -> ShapeRange:
    """Return the shapes that engines are built for.

    Args:
        video: the shape BxTx3xHxW that engines are optimized for.
        fixed: whether engines support only this video shape. The number of faces stays dynamic, because it varies.
        faces: the number of faces that engines are optimized for.
    """
    shape = f"video:{video}"
    bound = shape if fixed else ""
    return parse_shapes(bound, shape if faces is None else f"{shape},faces:{faces}x3x112x112", bound)


def build_engines(stages: Iterable[Stage], backends: Iterable[str], store: EngineStore) -> dict[str, dict[str, str]]:
    """Build the missing engines of all `stages` on all `backends`.

    If an engine cannot be built, the error is printed, and the stage runs in PyTorch.

    Returns:
        The outcome of each build as text, by stage and backend.
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
