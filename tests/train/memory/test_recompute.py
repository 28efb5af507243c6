"""Recomputation in backward: the value of one computation, the gradient of another, and few saved tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoding import decoded_with_gradient, diffsynths
from torch import Tensor, nn

from frostline.models.checkpoints.loading import load_components
from frostline.models.wan.vae import decoder_chunks
from frostline.models.wan.vae_chunks import decode_in_chunks
from frostline.train.memory.recompute import decode_recomputed, recomputed


class Doubled(nn.Module):
    """A function with two outputs of two inputs and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4))
        self.grad_modes: list[bool] = []
        self.dtypes: list[torch.dtype] = []

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.grad_modes.append(torch.is_grad_enabled())
        product = x[:, None] @ self.weight[None]
        self.dtypes.append(product.dtype)
        return {"first": product.tanh(), "second": (product * y[:, None]).sin()}


def of_all(outputs: dict[str, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    total = sum(((index + 1) * value.square()).sum() for index, value in enumerate(outputs.values()))
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, inputs, allow_unused=True)


def test_values_and_gradients_are_those_of_the_plain_computation() -> None:
    module = Doubled()
    x, y = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    expected = module(x, y)
    wanted = of_all(expected, [x, y, module.weight])
    module.grad_modes.clear()
    actual = recomputed(module, module, {"x": x, "y": y}, [module.weight])
    assert module.grad_modes == [False], "the first forward builds no graph"
    gradients = of_all(actual, [x, y, module.weight])
    assert module.grad_modes == [False, True]
    for name, value in expected.items():
        assert torch.equal(actual[name], value)
    for one, other in zip(gradients, wanted, strict=True):
        assert torch.equal(one, other)


def test_the_value_is_the_engines_and_the_gradient_is_not() -> None:
    module = Doubled()

    def engine(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        # The outputs also have another order.
        return {"second": torch.full((3, 4), 5.0), "first": torch.full((3, 4), 7.0)}

    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    outputs = recomputed(engine, module, {"x": x, "y": y}, [module.weight])
    assert {name: value[0, 0].item() for name, value in outputs.items()} == {"second": 5.0, "first": 7.0}
    weights = torch.randn(3, 4)
    given = [x, module.weight]
    actual = torch.autograd.grad((outputs["first"] * weights).sum(), given)
    wanted = torch.autograd.grad((module(x, y)["first"] * weights).sum(), given)
    for one, other in zip(actual, wanted, strict=True):
        assert torch.equal(one, other)


def test_what_needs_no_gradient_gets_none() -> None:
    module = Doubled()
    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    outputs = recomputed(module, module, {"x": x, "y": y})
    outputs["first"].sum().backward()
    assert x.grad is not None
    assert y.grad is None
    assert module.weight.grad is None, "a weight that was not passed must get no gradient"
    with torch.no_grad():
        assert not recomputed(module, module, {"x": x, "y": y})["first"].requires_grad


def test_backward_recomputes_under_the_same_autocast() -> None:
    module = Doubled()
    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = recomputed(module, module, {"x": x, "y": y})
    outputs["first"].sum().backward()
    assert module.dtypes == [torch.bfloat16, torch.bfloat16]
    recomputed(module, module, {"x": x, "y": y})["first"].sum().backward()
    assert module.dtypes[2:] == [torch.float32, torch.float32]


@pytest.fixture(scope="module", params=["tiny", "tiny-ti2v"])
def vae(request: pytest.FixtureRequest) -> Any:
    return load_components(request.param).vae


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize(("whole", "share"), [(False, 0.35), (True, 0.1)])
def test_decoding_recomputed_changes_nothing_and_keeps_less(vae: Any, frames: int, whole: bool, share: float) -> None:
    expected, gradient, kept = decoded_with_gradient(vae, frames, diffsynths(vae))
    networks = decoder_chunks(vae)
    video, recomputed_, less = decoded_with_gradient(
        vae, frames, lambda z: decode_recomputed(decode_in_chunks, networks, networks, z, whole)
    )
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=0)
    assert F.cosine_similarity(recomputed_.double().flatten(), gradient.double().flatten(), dim=0) > 1 - 1e-10
    assert (recomputed_ - gradient).norm() < 1e-5 * gradient.norm()
    assert less < share * kept


@pytest.mark.parametrize("whole", [False, True])
def test_a_decoders_caches_carry_the_gradient_and_not_the_engines_error(vae: Any, whole: bool) -> None:
    """With an engine whose outputs are wrong by 0.1 %, the video has this error, but the gradient hardly changes."""
    networks = decoder_chunks(vae)

    def engine(name: str) -> Callable[..., dict[str, Tensor]]:
        return lambda **inputs: {key: 1.001 * value for key, value in networks[name](**inputs).items()}

    engines = {name: engine(name) for name in networks}
    expected, gradient, _ = decoded_with_gradient(vae, 3, diffsynths(vae))
    video, other, _ = decoded_with_gradient(
        vae, 3, lambda z: decode_recomputed(decode_in_chunks, engines, networks, z, whole)
    )
    error = (video - expected).norm() / expected.norm()
    assert 5e-4 < error < 5e-3
    assert F.cosine_similarity(other.double().flatten(), gradient.double().flatten(), dim=0) > 0.999
    assert (other.norm() / gradient.norm() - 1).abs() < 0.01
