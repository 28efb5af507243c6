"""Non-maximum suppression with torchvision's kernel."""

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
    """Return the (K,) int64 indices of the boxes to keep, by descending score, like `torchvision.ops.nms`.

    Args:
        boxes: (N, 4) left, top, right, bottom.
        scores: (N,), in any order.
        threshold: a box whose intersection over union with a better one exceeds this is removed.
    Raises:
        ConfigError: torchvision does not match the installed torch.
    """
    return _kernel()(boxes, scores, threshold)


@functools.cache
def _kernel() -> Callable[..., Any]:
    # Importing the package also imports its models and torch's compiler, which takes longer than importing torch.
    folder = package_folder("torchvision")
    try:
        if "torchvision" not in sys.modules and folder is not None and (folder / "_C.so").is_file():
            torch.ops.load_library(folder / "_C.so")
        else:
            import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"torchvision is missing or does not match torch {torch.__version__} ({reason}): install the matching one"
        ) from error
    return torch.ops.torchvision.nms
