"""The bounds that engines must keep, by the floating-point type of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from frostline.models.precision import precision_name
from frostline.runtime.engines.tolerance import Tolerance

# The bounds by the type of the weights, both sides computing in that type. Measured on small models of random weights,
# the worst of ONNX Runtime, OpenVINO and AOTInductor, relative to the largest output: 6e-6, 3e-3 and 2.6e-2, of which
# the VAE encoder and the face embedder have the most.
_TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    # Engines only reorder sums, and a deep network gathers much of that.
    torch.float32: Tolerance(atol=1e-5, rtol=5e-5, cosine=0.999999),
    # 11 bits of mantissa, rounded at other places: engines keep in fp32 what PyTorch rounds between two kernels.
    torch.float16: Tolerance(atol=1e-3, rtol=1e-2, cosine=0.99999),
    # The same with 8 bits.
    torch.bfloat16: Tolerance(atol=8e-3, rtol=8e-2, cosine=0.999),
}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """Return the bounds that the engine of a stage must keep, its weights being of `dtype`.

    Raises:
        ConfigError: weights cannot be of this type.
    """
    precision_name(dtype)
    return _TOLERANCES[dtype]
