"""TensorRT, which builds for the GPU that it finds."""

from __future__ import annotations

from typing import Any

from .backend import TensorRTBackend


class TensorRT(TensorRTBackend):
    """Plans for the GPU of this machine."""

    packages = ("tensorrt",)
    install = "pip install 'frostline[tensorrt]'"
    cross_builds = False

    def library(self) -> Any:
        """Import tensorrt."""
        import tensorrt  # pyright: ignore[reportMissingImports]

        return tensorrt
