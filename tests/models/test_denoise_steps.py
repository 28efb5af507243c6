"""The selection of the live steps of a trajectory."""

import itertools
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frostline.errors import ConfigError
from frostline.models.denoise_steps import DenoiseSteps


def test_the_strategies_by_their_names() -> None:
    assert DenoiseSteps(4, 7).draw() == (4, 5, 6, 7)
    assert DenoiseSteps(4, 7, strategy="last").draw() == (7,)
    assert DenoiseSteps(0, 7, strategy="steps", steps=(1, 6)).draw() == (1, 6)
    assert DenoiseSteps(0, 7, strategy="uniform", num_steps=8).draw() == (0, 1, 2, 3, 4, 5, 6, 7)


@given(st.integers(0, 10), st.integers(0, 10), st.sampled_from(["random", "uniform"]), st.data())
def test_a_draw_is_that_many_steps_of_the_window(start: int, more: int, strategy: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, more + 1))
    steps = DenoiseSteps(start, start + more, strategy=strategy, num_steps=count)  # type: ignore[arg-type]
    drawn = steps.draw()
    assert sorted({*drawn}) == [*drawn]
    assert len(drawn) == count == len(steps.most_live)
    assert {*drawn} <= {*steps.may_be_live} == {*range(start, start + more + 1)}


@pytest.mark.parametrize("strategy", ["random", "uniform"])
def test_each_step_is_drawn_as_often(strategy: str) -> None:
    """Draw each step equally often, so that the mean over draws estimates the gradient through all steps."""
    steps = DenoiseSteps(2, 7, strategy=strategy, num_steps=4)  # type: ignore[arg-type]
    torch.manual_seed(0)
    counts = Counter(step for _ in range(1500) for step in steps.draw())
    assert {*counts} == {2, 3, 4, 5, 6, 7}
    assert all(abs(count - 1000) < 80 for count in counts.values())
    torch.manual_seed(5)
    drawn = [steps.draw() for _ in range(5)]
    torch.manual_seed(5)
    assert drawn == [steps.draw() for _ in range(5)], "the draws must only depend on the seed, for resuming"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (DenoiseSteps(0, 2, 3), r"grad_end_step 2.* runs the first 3 steps; a later step must have"),
        (DenoiseSteps(0, 7, 3, "steps", 0, (0, 2)), "a later step must have a gradient"),
        (DenoiseSteps(0, 7, 3, "random", 3), "a draw of 3 steps from grad_start_step 0 on may contain only these"),
        (DenoiseSteps(0, 7, 3, "uniform", 1), "a draw of 1 steps from grad_start_step 0"),
        (DenoiseSteps(3, 7, 3, experts="high"), "grad_start_step 3: the low-noise expert, which has no LoRA, runs"),
        (DenoiseSteps(0, 7, 3, "last", experts="high"), "from 3 on; an earlier step must have a gradient"),
        (DenoiseSteps(0, 7, 3, "random", 5, experts="high"), "a draw of 5 steps up to grad_end_step 7 may contain"),
        (DenoiseSteps(0, 7, 3, "uniform", 1, experts="high"), "a draw of 1 steps up to grad_end_step 7"),
        (
            DenoiseSteps(3, 7, 3, experts="both"),
            r"the LoRA of the high-noise.* the first 3 steps, but .*: include one of its steps, or "
            r"set lora\.experts to low",
        ),
        (
            DenoiseSteps(0, 2, 3, experts="both"),
            r"the LoRA of the low-noise expert.* the steps from 3 on, but .* are 0, 1, 2: include one of its steps",
        ),
        (DenoiseSteps(0, 7, 3, "last", experts="both"), "the steps with a gradient are 7"),
    ],
)
def test_steps_that_may_train_nothing_are_refused(steps: DenoiseSteps, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        steps.check_live()


@pytest.mark.parametrize(
    "steps",
    [
        DenoiseSteps(0, 3, 3),
        DenoiseSteps(0, 7, 3, "random", 4),
        DenoiseSteps(0, 7, 3, "uniform", 2),
        DenoiseSteps(0, 7, 3, "last"),
        DenoiseSteps(2, 7, 3, experts="high"),
        DenoiseSteps(0, 7, 3, "random", 6, experts="high"),
        DenoiseSteps(0, 7, 3, "uniform", 3, experts="high"),
        DenoiseSteps(2, 3, 3, experts="both"),
        DenoiseSteps(0, 7, 3, "random", 1, experts="both"),
    ],
)
def test_some_step_with_a_lora_is_enough(steps: DenoiseSteps) -> None:
    steps.check_live()
    assert steps.live_with_lora >= 1


@given(st.sampled_from(["random", "uniform"]), st.integers(1, 8), st.integers(0, 8), st.sampled_from(["low", "high"]))
def test_what_is_not_refused_has_a_lora_in_every_draw(strategy: str, count: int, high: int, experts: str) -> None:
    steps = DenoiseSteps(0, 7, high, strategy, count, experts=experts)  # type: ignore[arg-type]
    seen = [steps.with_lora(steps.draw()) for _ in range(100)]
    try:
        steps.check_live()
    except ConfigError:
        return
    assert all(seen)
    assert max(map(len, seen)) <= steps.live_with_lora


def all_draws(steps: DenoiseSteps) -> set[tuple[int, ...]]:
    window, count = range(steps.start, steps.end + 1), steps.num_steps
    if steps.strategy == "random":
        return {*itertools.combinations(window, count)}
    distance = Fraction(len(window), count)
    offsets = [Fraction(part, 2 * len(window)) for part in range(2 * len(window))]
    return {tuple(window[int((offset + number) * distance)] for number in range(count)) for offset in offsets}


@given(
    st.sampled_from(["random", "uniform"]),
    st.integers(1, 9),
    st.integers(0, 10),
    st.sampled_from(["low", "high", "both"]),
    st.booleans(),
)
def test_the_most_that_a_draw_needs_is_of_a_draw(
    strategy: str, count: int, high: int, experts: str, stop: bool
) -> None:
    """Compute the exact maximum over all draws, so that the memory plan counts neither too little nor too much."""
    options: Any = {"strategy": strategy, "experts": experts, "stop_latent_gradient": stop}
    steps = DenoiseSteps(1, 9, high, num_steps=count, **options)
    draws = all_draws(steps)
    assert {steps.draw() for _ in range(20)} <= draws
    assert steps.most_live in draws
    assert steps.live_with_lora == max(len(steps.with_lora(live)) for live in draws)
    assert steps.live_uses == max(len(steps.with_graph(live)) for live in draws)
    if experts != "both":
        trains_in_all = all(map(steps.with_lora, draws))
        try:
            steps.check_live()
        except ConfigError:
            assert not trains_in_all
        else:
            assert trains_in_all


def test_the_gradient_passes_through_live_steps_behind_a_lora() -> None:
    live = (1, 2, 4, 6)
    low, high, both = (DenoiseSteps(0, 7, 3, experts=experts) for experts in ("low", "high", "both"))
    assert [steps.with_lora(live) for steps in (low, high, both)] == [(4, 6), (1, 2), live]
    assert [steps.with_graph(live) for steps in (low, high, both)] == [(4, 6), live, live]
    assert DenoiseSteps(0, 7, 3, experts="high", stop_latent_gradient=True).with_graph(live) == (1, 2)
