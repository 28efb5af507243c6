"""TensorRT-RTX: builds for named compute capabilities on any machine, and finishes compiling on the target machine."""

from __future__ import annotations

from typing import Any

from .tensorrt.backend import TensorRTBackend


class TensorRTRTX(TensorRTBackend):
    """Build plans for NVIDIA RTX GPUs."""

    packages = ("tensorrt-rtx",)
    install = "pip install 'frostline[tensorrt-rtx]'"
    cross_builds = True

    def library(self) -> Any:
        """Import tensorrt_rtx."""
        import tensorrt_rtx

        return tensorrt_rtx
