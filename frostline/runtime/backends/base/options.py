"""What a build can be asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# The fastest on ONNX Runtime's CPU provider, and every TensorRT builds it.
OPSET = 20

BuildProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """Each backend heeds what concerns it; the first two are part of an engine's identity.

    opset: of the ONNX graph that the backend starts from.
    compute_capabilities: the GPUs to build for, such as "8.9"; "current" is this machine's. None given: this machine's
        GPU, and what the backend proposes where there is none.
    asked_maximum: open dimensions, such as `batch`, whose largest extent someone asked for: a backend that cannot
        serve it refuses, where else it lowers the extent.
    timing_cache: a file in which the backend keeps its measurements for the next build.
    progress: told phase, steps done, and steps in all.
    """

    opset: int = OPSET
    compute_capabilities: tuple[str, ...] = ()
    asked_maximum: frozenset[str] = frozenset()
    timing_cache: Path | None = None
    progress: BuildProgress | None = None
