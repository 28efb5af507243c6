"""Non-maximum suppression by torchvision's kernel."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """As `torchvision.ops.nms`: (K,) int64, what is kept of (N, 4) `boxes`, by falling `scores` (N,).

    Args:
        threshold: a box that overlaps a better one by more (intersection over union) goes.
    """
    return _kernel()(boxes, scores, threshold)


@functools.cache
def _kernel() -> Callable[..., Any]:
    # The package brings its models, and with them torch's compiler: to import it takes longer than to import torch.
    spec = importlib.util.find_spec("torchvision")
    library = Path(*(spec.submodule_search_locations or ()) if spec else ()) / "_C.so"
    if "torchvision" not in sys.modules and library.is_file():
        torch.ops.load_library(library)
    else:
        import torchvision  # noqa: F401
    return torch.ops.torchvision.nms
