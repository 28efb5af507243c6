"""Build options of engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# The fastest on ONNX Runtime's CPU provider, and every TensorRT builds it.
OPSET = 20

BuildProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build. A backend ignores those that do not concern it; the first two identify an engine.

    opset: of the ONNX graph that the backend starts from.
    compute_capabilities: the GPUs to build for, such as "8.9"; "current" is this machine's. None given: this machine's
        GPU, and what the backend proposes where there is none.
    asked_maximum: open dimensions, such as `batch`, whose largest extent the user set: a backend that cannot serve
        that extent refuses to build, while it lowers default extents.
    timing_cache: a file in which the backend keeps its measurements for the next build.
    progress: called with phase, completed steps and total steps.
    """

    opset: int = OPSET
    compute_capabilities: tuple[str, ...] = ()
    asked_maximum: frozenset[str] = frozenset()
    timing_cache: Path | None = None
    progress: BuildProgress | None = None
