"""The description of a network: what makes two networks different, and what does not."""

import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from frostline.runtime.identity.architecture import adapter_parameters, describe


class Mode(Enum):
    FAST = 1
    EXACT = 2


@dataclass
class Options:
    power: int
    names: tuple[str, ...] = ("a",)


class Holder(nn.Module):
    """A network with one attribute of any type."""

    RUN_SETTINGS = frozenset({"how"})

    def __init__(self, value: Any, how: int = 0) -> None:
        super().__init__()
        self.value = value
        self.how = how


def doubled(x: int) -> int:
    return 2 * x


DIFFERENT: dict[str, tuple[Any, ...]] = {
    "constants": (1, 2, 1.0, True, None, "1", b"1", (1, 2), [1, 2.0], {"a": 1}, {"a": 2}, {"b": 1}, {1, 2}, {1}),
    "types": (torch.float32, torch.float16, nn.ReLU, nn.GELU, Mode.FAST, Mode.EXACT, torch.Size([1])),
    "functions": (doubled, torch.relu, partial(doubled, 1), partial(doubled, 2)),
    "dataclasses": (Options(1), Options(2), Options(1, ("b",)), [Options(1)]),
    "tensors": (torch.ones(2), torch.zeros(2), torch.ones(2).half(), torch.ones(1, 2), [torch.ones(2)]),
    "arrays": (np.ones(2), np.zeros(2), np.ones(2, np.float32), np.float64(1)),
    "hidden networks": ([nn.Linear(1, 1)], [nn.Linear(1, 2)], [nn.ReLU()]),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_attributes_count(kind: str) -> None:
    values = DIFFERENT[kind]
    assert len({describe(Holder(value)) for value in values}) == len(values)


def test_weights_of_networks_that_are_no_parts_count() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    assert describe(Holder([one])) != describe(Holder([other]))
    other.load_state_dict(one.state_dict())
    assert describe(Holder([one])) == describe(Holder([other]))


@pytest.mark.parametrize("values", [(Path("/a"), Path("/b")), (torch.device("cpu"), torch.device("meta"))])
def test_where_it_is_does_not_count(values: tuple[Any, ...]) -> None:
    assert len({describe(Holder(value)) for value in values}) == 1


def test_how_it_is_run_does_not_count() -> None:
    plain = Holder(1)
    assert describe(plain) == describe(Holder(1, how=2)) == describe(plain.train()) == describe(plain.eval())
    hooked = Holder(1)
    hooked.register_forward_hook(lambda *_: None)
    vars(hooked)["_compiled_call_impl"] = print  # set like `compile` does, without importing a compiler
    assert describe(hooked) == describe(plain)


def test_parts_count_by_name_and_class() -> None:
    networks = [nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU()), nn.ModuleDict({"default": nn.ReLU()})]
    networks += [nn.ModuleDict({"lora_default": nn.ReLU()}), nn.ModuleDict({}), nn.Sequential(nn.LeakyReLU(0.2))]
    shared = nn.ReLU()
    networks += [nn.Sequential(shared, shared), nn.Sequential(nn.ReLU(), nn.ReLU())]
    assert len({describe(network) for network in networks}) == len(networks)


def test_a_network_that_knows_its_parent_has_an_end() -> None:
    parent, child = Holder(1), Holder(None)
    parent.child = child
    child.value = [parent]
    assert describe(parent)


def descriptions() -> list[str]:
    return [describe(Holder(value)) for kind in DIFFERENT if kind != "hidden networks" for value in DIFFERENT[kind]]


def test_it_says_the_same_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom test_architecture import descriptions\nprint(descriptions())"
    )
    run = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert run.stdout.strip() == str(descriptions()).replace(__name__, "test_architecture"), run.stderr


def adapted(rank: int = 4, name: str = "default", targets: tuple[str, ...] = ("0",), **options: Any) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, and the other process above does not need it

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(targets), **options), model, name)


def test_a_live_adapter_does_not_count_but_where_it_is() -> None:
    assert describe(adapted(), live_lora=True) == describe(adapted(8, "other", lora_alpha=3), live_lora=True)
    assert "lora_A" not in describe(adapted(), live_lora=True)
    others: list[nn.Module] = [adapted(targets=("0", "1")), adapted(targets=("1",)), adapted(use_dora=True)]
    others += [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))]
    assert len({describe(model, live_lora=True) for model in (adapted(), *others)}) == 1 + len(others)


def test_an_adapter_that_is_not_live_counts() -> None:
    models = [adapted(), adapted(8), adapted(lora_alpha=3), adapted(name="other")]
    assert len({describe(model) for model in models}) == len(models)


def test_the_matrices_of_adapters_are_told_from_what_else_they_have() -> None:
    model = adapted(use_dora=True, targets=("0", "1"))
    ids = adapter_parameters(model)
    names = {name for name, parameter in model.named_parameters() if id(parameter) in ids}
    assert names == {f"{index}.lora_{matrix}.default.weight" for index in (0, 1) for matrix in "AB"}
