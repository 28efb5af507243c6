"""TensorRT: builds engines for the GPU of this machine."""

from __future__ import annotations

from typing import Any

from .backend import TensorRTBackend


class TensorRT(TensorRTBackend):
    """Build plans for the GPU of this machine."""

    packages = ("tensorrt",)
    install = "pip install 'frostline[tensorrt]'"
    cross_builds = False

    def library(self) -> Any:
        """Import tensorrt."""
        import tensorrt  # pyright: ignore[reportMissingImports]

        return tensorrt
