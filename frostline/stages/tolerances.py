"""The tolerances of engines by floating-point type of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from frostline.models.precision import precision_name
from frostline.runtime.engines.tolerance import Tolerance

# Engine and PyTorch compute in the dtype of the weights. The largest deviations measured on small models with random
# weights, over ONNX Runtime, OpenVINO and AOTInductor, relative to the largest output: 6e-6 (fp32), 3e-3 (fp16) and
# 2.6e-2 (bf16). The VAE encoder and the face embedder have the largest ones.
_TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    # Engines only change the order of sums, but deviations accumulate in deep networks.
    torch.float32: Tolerance(atol=1e-5, rtol=5e-5, cosine=0.999999),
    # A mantissa of 11 bits, rounded after other operations: engines keep values in fp32 that PyTorch rounds between two
    # kernels.
    torch.float16: Tolerance(atol=1e-3, rtol=1e-2, cosine=0.99999),
    # The same with 8 bits of mantissa.
    torch.bfloat16: Tolerance(atol=8e-3, rtol=8e-2, cosine=0.999),
}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """Return the tolerance of a stage's engines for weights of `dtype`.

    Raises:
        ConfigError: weights cannot have this dtype.
    """
    precision_name(dtype)
    return _TOLERANCES[dtype]
