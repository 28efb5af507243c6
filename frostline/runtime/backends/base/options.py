"""Options for building engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# The fastest opset on ONNX Runtime's CPU provider; every TensorRT version supports it.
OPSET = 20

BuildProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build. A backend ignores options that it does not support; the first two are part of an engine's
    key.

    Attributes:
        opset: opset of the ONNX graph that the backend compiles.
        compute_capabilities: the GPUs to build for, such as "8.9"; "current" is this machine's GPU. If empty: this
            machine's GPU, or the backend's defaults if there is none.
        asked_maximum: dynamic dimensions, such as `batch`, whose maximum the user set. A backend that does not support
            this maximum raises an error; default maxima are lowered instead.
        timing_cache: file in which the backend stores its measurements for the next build.
        progress: called with phase, completed steps and total steps.
    """

    opset: int = OPSET
    compute_capabilities: tuple[str, ...] = ()
    asked_maximum: frozenset[str] = frozenset()
    timing_cache: Path | None = None
    progress: BuildProgress | None = None
