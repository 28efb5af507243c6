"""Blocks whose weights are in main memory: same results, few copies at a time, and when this is refused."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import QUICK, gradient, small_clips

import frostline.models.block_offload as offload_file
from frostline.config import CHECKPOINTING
from frostline.errors import ConfigError
from frostline.models.block_offload import WINDOW, Slabs, placed, waiting_blocks
from frostline.train import WanTrainingModule

SHARPNESS = [{"type": "sharpness", "baseline": 0.0, "scale": 1.0}]


def module_of(blocks: int, model: str = "tiny", quantization: Any = "none", **settings: Any) -> WanTrainingModule:
    torch.manual_seed(0)
    module = WanTrainingModule.from_pretrained(
        model,
        **{"engines": None, "plan": "torch", "offload_blocks": blocks, "quantization": quantization},
        **{**QUICK, "rewards": SHARPNESS, "lora": {"rank": 2}, "gradient_checkpointing": "none", **settings},
    )
    with torch.no_grad():
        for index, parameter in enumerate(module.trainable_parameters().values()):
            parameter.copy_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return module


def a_step(module: WanTrainingModule) -> tuple[list[float], torch.Tensor]:
    torch.manual_seed(1)
    loss, score, kl_loss = module(small_clips(1))
    loss.backward()
    return [loss.item(), score.item(), kl_loss.item()], gradient(module)


class Watched:
    """Record the blocks whose weights are copied, in order, and the maximum number of blocks with copies at a time."""

    def __init__(self, patch: pytest.MonkeyPatch, module: WanTrainingModule) -> None:
        self.order: list[int] = []
        self.most = 0
        self._alive: dict[int, int] = {}
        places = {block: place for expert in module.model.experts for place, block in enumerate(expert.module.blocks)}

        class Copies(offload_file._Copies):
            def __init__(copies, block: torch.nn.Module, device: torch.device) -> None:  # noqa: N805
                super().__init__(block, device)
                key = len(self.order)
                self.order.append(places[block])
                self._alive[key] = len(copies._tensors)
                for tensor in copies._tensors.values():
                    # A storage lives as long as views of the copy, or what autograd saves.
                    weakref.finalize(tensor.untyped_storage(), self._free, key)
                self.most = max(self.most, self.alive)

        patch.setattr(offload_file, "_Copies", Copies)

    @property
    def alive(self) -> int:
        return sum(count > 0 for count in self._alive.values())

    def _free(self, key: int) -> None:
        self._alive[key] -= 1


@pytest.fixture(scope="module")
def expected() -> Callable[..., tuple[list[float], torch.Tensor]]:
    """Return a function that computes a step with all weights on the device."""
    known: dict[str, tuple[list[float], torch.Tensor]] = {}

    def step(**how: Any) -> tuple[list[float], torch.Tensor]:
        key = repr(how)
        if key not in known:
            known[key] = a_step(module_of(0, **how))
        return known[key]

    return step


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_step_is_the_same_to_the_bit(
    kind: Any, count: int, expected: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, gradients = expected(gradient_checkpointing=kind)
    module = module_of(count, gradient_checkpointing=kind)
    watched = Watched(monkeypatch, module)
    again = a_step(module)
    assert again[0] == loss
    assert torch.equal(again[1], gradients)
    assert watched.most == min(count, WINDOW)
    # Two live forwards, a frozen one, and one for both KL references. Backward copies the blocks of each live step
    # again, with full checkpointing after another forward.
    forward = [*waiting_blocks(count, 4)]
    if kind == "full":
        assert sorted(watched.order) == sorted(8 * forward)
    else:
        # If the graph contains both steps, the only offloaded block is needed twice in succession, and copied once.
        steps = 1 if count == 1 and kind == "none" else 2
        assert watched.order == 4 * forward + steps * forward[::-1]


@pytest.mark.parametrize(
    "how",
    [
        {"quantization": "int8"},
        {"quantization": "nf4", "gradient_checkpointing": "full"},
        {"offload_saved_tensors": True},
        {"offload_saved_tensors": True, "gradient_checkpointing": "block"},
        {"model": "tiny-moe", "lora": {"rank": 2, "experts": "both"}},
        {"model": "tiny-moe"},
        {"backprop": {"strategy": "steps", "steps": [1, 2], "stop_latent_gradient": True}},
    ],
    ids=repr,
)
def test_with_other_settings_too(
    how: dict[str, Any], expected: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, gradients = expected(**how)
    module = module_of(3, **how)
    watched = Watched(monkeypatch, module)
    again = a_step(module)
    assert again[0] == loss
    assert torch.equal(again[1], gradients)
    # Each denoiser has a separate window.
    assert watched.most <= WINDOW * len(module.model.experts)


def test_what_autograd_keeps_is_without_the_copies() -> None:
    """Without recomputation, the graph contains no views of copies: all copies are freed after the forward."""
    module = module_of(4)
    with pytest.MonkeyPatch.context() as patch:
        watched = Watched(patch, module)
        loss = module(small_clips(1))[0]
        assert watched.alive == 0
        loss.backward()
        assert watched.alive == 1


def test_weights_stay_where_they_are() -> None:
    """Keep the weights in main memory when the module is moved; the copies are on the block's device."""
    module = module_of(2)
    denoiser: Any = module.model.experts[0].module
    waiting = [*denoiser.offload.weights()]
    assert waiting
    before = [(weight, weight.data_ptr()) for weight in waiting]
    denoiser.to("meta")
    others = {id(weight) for weight in waiting}
    assert {p.device.type for p in denoiser.parameters() if id(p) in others} == {"cpu"}
    assert {p.device.type for p in denoiser.parameters() if id(p) not in others} == {"meta"}
    assert [(weight, weight.data_ptr()) for weight in denoiser.offload.weights()] == before
    copies = offload_file._Copies(denoiser.blocks[1], torch.device("meta"))
    assert {copied.device.type for copied in copies.by_name().values()} == {"meta"}


def test_a_copied_module_has_blocks_of_its_own() -> None:
    module = module_of(2)
    copied = copy.deepcopy(module)
    (own,), (other,) = ([each.module.offload for each in made.model.experts] for made in (module, copied))
    assert own is not None
    assert other is not None
    for weight in other.weights():
        weight.data.zero_()
    assert all(weight.any() for weight in own.weights() if weight.ndim > 1)
    assert a_step(module)[0] != a_step(copied)[0]


def test_the_frozen_expert_is_released_and_read_again() -> None:
    """Read its weights into main memory again, without treating them as changed."""
    module = module_of(3, model="tiny-moe")
    weights = module.components.weights["denoiser_high_noise"]
    weights.restore()
    assert weights.as_read
    before = a_step(module)
    weights.release()
    assert not weights.resident
    weights.restore()
    again = a_step(module)
    assert again[0] == before[0]
    assert torch.equal(again[1], before[1])


@pytest.mark.parametrize(("count", "total"), [(0, 5), (1, 5), (2, 5), (3, 8), (5, 5), (9, 5)])
def test_blocks_that_wait_are_spread(count: int, total: int) -> None:
    places = waiting_blocks(count, total)
    assert len(places) == min(count, total)
    assert all(0 <= place < total for place in places)
    gaps = {later - earlier for earlier, later in zip((-1, *places), places, strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_slabs_are_powers_of_two_and_hardly_larger_than_their_content() -> None:
    tensors = [torch.randn(1000 + 37 * index) for index in range(300)]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    slabs = Slabs(nbytes, pinned=False)
    copies = [slabs.copy(tensor) for tensor in tensors]
    assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))
    assert nbytes <= slabs.allocated <= 1.25 * nbytes
    sizes = {one.untyped_storage().nbytes() for one in copies}
    assert all(size & (size - 1) == 0 for size in sizes)
    assert Slabs(3, pinned=False).copy(torch.zeros(0, 2)).shape == (0, 2)


def test_tensors_are_placed_one_by_one() -> None:
    tensors = {"a": torch.randn(3, 4).to(torch.bfloat16), "b": torch.ones(2, dtype=torch.uint8), "c": torch.randn(2)}
    before = dict(tensors)
    result = placed(tensors, {"a", "b"}, "meta")
    assert tensors == {}
    assert torch.equal(result["a"], before["a"])
    assert torch.equal(result["b"], before["b"])
    assert result["c"].device.type == "meta"


def test_compiled_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"offload\.blocks: .* cannot be compiled"):
        module_of(1, torch_compile=True)
