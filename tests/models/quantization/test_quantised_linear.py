"""Quantised layers compared with ordinary layers that have the dequantised weights."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from frostline.errors import ConfigError
from frostline.models.lora.inject import adapters_off, inject_lora, lora_parameters
from frostline.models.quantization.linear import (
    QuantisedLinear,
    dequantised_bytes,
    plain_layers,
    quantise_layers,
    quantised_layers,
)
from frostline.models.quantization.storage import FORMATS
from frostline.runtime.identity.architecture import describe

KINDS = [*FORMATS]
TYPES = [torch.float32, torch.bfloat16]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 96), nn.Linear(96, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.gelu(self.first(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(32, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return x


def network(kind: str | None, dtype: torch.dtype = torch.float32) -> Blocks:
    torch.manual_seed(0)
    made = Blocks().to(dtype).requires_grad_(False)
    if kind is not None:
        quantise_layers(made, kind, dtype)
    return made


def dequantised(quantised: Blocks, dtype: torch.dtype) -> Blocks:
    """Return ordinary layers with the dequantised weights, computed here from codes and scales by the formulas."""
    plain = network(None, dtype)
    for name, layer in quantised_layers(quantised).items():
        codes, scale = layer.codes.data, layer.scale.data
        if layer.kind == "int8":
            values = codes.double() * scale.double()
        elif layer.kind == "fp8":
            values = codes.view(torch.float8_e4m3fn).double() * scale.double()
        else:
            from frostline.models.quantization.storage import NF4_LEVELS

            levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
            high, low = levels[(codes // 16).long()], levels[(codes % 16).long()]
            values = (torch.stack([high, low], dim=-1).flatten(1) * scale.double()).flatten()
        plain.get_submodule(name).weight.data = values.reshape(layer.out_features, layer.in_features).to(dtype)
    return plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_forward_and_gradient_are_those_of_the_dequantised_weights(kind: str, dtype: torch.dtype) -> None:
    quantised = network(kind, dtype)
    found, expected = [], []
    for made, results in ((quantised, found), (dequantised(quantised, dtype), expected)):
        torch.manual_seed(1)
        inject_lora(made, 4, target_modules=["first", "second"])
        for index, parameter in enumerate(lora_parameters(made).values()):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(9)).to(dtype).requires_grad_()
        y = made(x)
        y.float().square().sum().backward()
        with torch.no_grad():
            assert torch.equal(made(x), y)
        with adapters_off(made):
            base = made(x)
        assert x.grad is not None
        results += [y, base, x.grad, *(parameter.grad for parameter in lora_parameters(made).values())]
    assert len(found) == 3 + 8
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_lora_does_not_depend_on_how_the_base_is_stored(kind: str) -> None:
    loras = []
    for made in (network(None, torch.bfloat16), network(kind, torch.bfloat16)):
        torch.manual_seed(3)
        inject_lora(made, 4, target_modules=["first"])
        loras.append(lora_parameters(made))
    assert loras[0].keys() == loras[1].keys()
    assert all(torch.equal(loras[0][name], loras[1][name]) for name in loras[0])


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_no_dequantised_weight(kind: str) -> None:
    quantised = network(kind)
    kept: list[Tensor] = []
    x = torch.randn(4, 32, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        quantised.blocks[0].first(x)
    stored = {parameter.data_ptr() for parameter in quantised.parameters()}
    assert kept and {tensor.data_ptr() for tensor in kept} <= stored


@pytest.mark.parametrize("kind", KINDS)
def test_casting_and_copying_keep_what_is_stored(kind: str) -> None:
    quantised = network(kind)
    before = {name: tensor.clone() for name, tensor in quantised.state_dict().items()}
    casts = (copy.deepcopy, lambda made: made.to("cpu", torch.bfloat16), nn.Module.half, nn.Module.double)
    for cast in casts:
        made = cast(quantised)
        for name, layer in quantised_layers(made).items():
            assert torch.equal(layer.codes, before[f"{name}.codes"])
            assert torch.equal(layer.scale, before[f"{name}.scale"])
            assert layer.weight.dtype == torch.float32
            assert not any(parameter.requires_grad for parameter in layer.parameters())
            if kind == "nf4":
                assert layer.table is not None and layer.table.dtype == torch.float32
    other = network(kind)
    other.load_state_dict(before)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_casts_as_ordinary_layers_do(kind: str) -> None:
    quantised = network(kind)
    plain = dequantised(quantised, torch.float32)
    results = []
    for made in (quantised, plain):
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = made.blocks[0].first(x)
        y.sum().backward()
        results.append((y, x.grad))
    assert results[0][0].dtype == torch.bfloat16
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_only_layers_of_blocks_are_stored_so(kind: str) -> None:
    quantised = network(kind, torch.bfloat16)
    assert type(quantised.before) is nn.Linear
    assert sorted(quantised_layers(quantised)) == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("first", "second")]
    sizes = {id(parameter): size for parameter, size in dequantised_bytes(quantised)}
    total = sum(sizes.get(id(parameter), parameter.nbytes) for parameter in quantised.parameters())
    assert total == sum(parameter.nbytes for parameter in network(None, torch.bfloat16).parameters())
    with pytest.raises(ConfigError, match="Linear has no linear layers in blocks"):
        quantise_layers(nn.Linear(2, 2), kind, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_layers_are_there_for_a_while(kind: str) -> None:
    quantised = network(kind)
    inject_lora(quantised, 2, target_modules=["first"])
    x = torch.randn(2, 32)
    layers, y = quantised_layers(quantised), quantised(x)
    with plain_layers(quantised):
        assert quantised_layers(quantised) == {}
        assert torch.equal(quantised(x), y)
    assert quantised_layers(quantised) == layers
    with pytest.raises(ZeroDivisionError), plain_layers(quantised):
        _ = 1 / 0
    assert quantised_layers(quantised) == layers


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_compiled(kind: str) -> None:
    quantised = network(kind)
    results = []
    for call in (quantised, torch.compile(quantised, backend="aot_eager")):
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = call(x)
        y.sum().backward()
        assert x.grad is not None
        results.append((y, x.grad))
    torch.testing.assert_close(results[0], results[1])


def test_the_description_says_how_it_is_stored() -> None:
    made = [network(None), *(network(kind, dtype) for kind in KINDS for dtype in TYPES)]
    assert len({describe(each) for each in made}) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_refused(kind: str) -> None:
    quantised = network(kind)
    inject_lora(quantised, 2, target_modules=["first"])
    layer = quantised.blocks[0].first
    assert isinstance(layer.base_layer, QuantisedLinear)
    with pytest.raises(ConfigError, match="cannot be merged into quantised weights"):
        layer.merge()
