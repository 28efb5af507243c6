"""TensorRT-RTX, which builds for named compute capabilities on any machine, and finishes compiling where it runs."""

from __future__ import annotations

from typing import Any

from .tensorrt.backend import TensorRTBackend


class TensorRTRTX(TensorRTBackend):
    """Plans for NVIDIA RTX GPUs."""

    packages = ("tensorrt-rtx",)
    install = "pip install 'frostline[tensorrt-rtx]'"
    cross_builds = True

    def library(self) -> Any:
        """Import tensorrt_rtx."""
        import tensorrt_rtx

        return tensorrt_rtx
