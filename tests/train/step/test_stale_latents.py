"""Latents are reused for the number of optimizer steps that the settings state, and then computed again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.tiny.clips import held_out_clips
from frostline.train import WanTrainingModule
from frostline.train.step.stale_latents import StaleLatents

MakeModule = Callable[..., WanTrainingModule]
CPU = torch.device("cpu")


class Computed:
    """Return the number of the optimizer step for each row, and record the calls."""

    def __init__(self, kept: StaleLatents) -> None:
        self.kept = kept
        self.rows: list[list[int]] = []

    def __call__(self, rows: list[int]) -> Tensor:
        self.rows.append(rows)
        return torch.full((len(rows), 1), float(self.kept.step))


def test_what_is_too_old_is_computed_anew() -> None:
    kept = StaleLatents(2)
    compute = Computed(kept)
    seen = []
    for kept.step in range(6):
        seen.append(kept.reuse(["a"], compute, CPU).item())
    assert seen == [0, 0, 0, 3, 3, 3]
    assert len(compute.rows) == 2


def test_each_row_of_a_batch_is_reused_by_itself() -> None:
    kept = StaleLatents(2)
    compute = Computed(kept)
    kept.reuse(["a"], compute, CPU)
    kept.step = 1
    assert kept.reuse(["b", "a", "b"], compute, CPU).flatten().tolist() == [1, 0, 1]
    assert compute.rows == [[0], [2]]
    kept.step = 3
    assert kept.reuse(["a", "b"], compute, CPU).flatten().tolist() == [3, 1]


def test_it_survives_a_checkpoint() -> None:
    kept = StaleLatents(4)
    kept.reuse(["a"], Computed(kept), CPU)
    other = StaleLatents(4)
    other.restore(kept.tensors(), 4)
    compute = Computed(other)
    assert other.reuse(["a"], compute, CPU).item() == 0
    other.step = 5
    assert other.reuse(["a"], compute, CPU).item() == 5


def changed(module: WanTrainingModule) -> None:
    with torch.no_grad():
        for parameter in module.trainable_parameters().values():
            parameter.add_(0.05)


@pytest.fixture
def data() -> dict[str, Any]:
    clips = held_out_clips(1, seed=5, num_frames=5, size=32)
    return {"prompt": clips.prompts, "video": clips.video}


SETTINGS: dict[str, Any] = {
    "num_inference_steps": 3,
    "grad_start_step": 2,
    "grad_end_step": 2,
    "rewards": [{"type": "sharpness"}],
}


def test_a_step_reuses_the_rollout_of_an_earlier_adapter(make_module: MakeModule, data: dict[str, Any]) -> None:
    def starts(policy: str, lora: bool = True) -> list[Tensor]:
        module = make_module(**SETTINGS, rollout={"policy": policy})
        if not lora:
            with torch.no_grad():
                for parameter in module.trainable_parameters().values():
                    parameter.zero_()
        sampler, seen = module.parts.sampler, []
        tail = sampler.tail

        def watch(latents: Tensor, *rest: Any) -> Any:
            seen.append(latents)
            return tail(latents, *rest)

        sampler.tail = watch  # type: ignore[method-assign]
        for number in range(3):
            if module.parts.stale is not None:
                module.parts.stale.step = number
            module(data)
            changed(module)
        return seen

    current, stale, base, without = starts("current"), starts("stale:1"), starts("base"), starts("current", lora=False)
    assert not torch.equal(current[0], current[1])
    assert torch.equal(stale[0], current[0])
    assert torch.equal(stale[1], stale[0])
    assert torch.equal(stale[2], current[2])
    assert torch.equal(base[0], base[2])
    torch.testing.assert_close(base[0], without[0], atol=1e-6, rtol=0)


def test_the_base_model_makes_the_rollout_once(make_module: MakeModule, data: dict[str, Any]) -> None:
    module = make_module(**SETTINGS, rollout={"policy": "base"})
    calls: list[str | None] = []
    run = module.runtime.run

    def count(stage: str, *rest: Any, variant: str | None = None, **options: Any) -> Any:
        if stage == "denoiser":
            calls.append(variant)
        return run(stage, *rest, variant=variant, **options)

    module.runtime.run = count  # type: ignore[method-assign]
    for expected in (["reference"] * 3, ["reference"]):
        calls.clear()
        module(data)
        changed(module)
        assert calls == expected


def test_steps_that_nobody_counts_are_noticed(make_module: MakeModule, data: dict[str, Any]) -> None:
    module = make_module(**SETTINGS, rollout={"policy": "stale:1"})
    module(data)
    module(data)
    changed(module)
    with pytest.raises(ConfigError, match=r"add 1 to module\.parts\.stale\.step"):
        module(data)
