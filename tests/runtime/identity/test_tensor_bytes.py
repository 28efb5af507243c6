"""The bytes of a tensor with any strides."""

import pytest
import torch
from torch import Tensor

from frostline.runtime.identity.tensor_bytes import tensor_bytes


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(3, 2).t(),
        torch.ones(1).as_strided((1,), (0,)),
        torch.ones(()),
        torch.empty(0, 3),
        torch.ones(1).expand(4),
        torch.arange(4, dtype=torch.bfloat16),
        torch.tensor([True, False]),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}",
)
def test_the_bytes_are_those_of_a_dense_copy(tensor: Tensor) -> None:
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    assert tensor_bytes(tensor).tobytes() == bytes(dense.untyped_storage().tolist())
