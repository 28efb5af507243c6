"""Non-maximum suppression by torchvision's kernel."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frostline.errors import ConfigError
from frostline.package_info import package_folder


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """As `torchvision.ops.nms`: (K,) int64, what is kept of (N, 4) `boxes`, by falling `scores` (N,).

    Args:
        threshold: a box that overlaps a better one by more (intersection over union) goes.
    Raises:
        ConfigError: torchvision does not go with torch.
    """
    return _kernel()(boxes, scores, threshold)


@functools.cache
def _kernel() -> Callable[..., Any]:
    # The package brings its models, and with them torch's compiler: to import it takes longer than to import torch.
    folder = package_folder("torchvision")
    try:
        if "torchvision" not in sys.modules and folder is not None and (folder / "_C.so").is_file():
            torch.ops.load_library(folder / "_C.so")
        else:
            import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"torchvision is missing or not made for torch {torch.__version__}: {reason}") from error
    return torch.ops.torchvision.nms
