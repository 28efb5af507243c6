"""The noise schedule: its formula, first and last sigma, Euler step, and diffsynth's scheduler."""

import math

import pytest
import torch
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.errors import ConfigError
from frostline.models.schedule import FlowMatchSchedule

SCHEDULES = st.builds(FlowMatchSchedule, st.integers(1, 200), st.floats(0.05, 50))


@given(SCHEDULES)
@settings(max_examples=100, deadline=None)
def test_sigmas_fall_from_one_to_zero(schedule: FlowMatchSchedule) -> None:
    sigmas = schedule.sigmas
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (schedule.num_inference_steps + 1,)
    assert sigmas[0].item() == pytest.approx(1, abs=1e-14)
    assert sigmas[-1].item() == 0
    assert (sigmas.diff() < 0).all()


@given(SCHEDULES)
@settings(max_examples=100, deadline=None)
def test_sigmas_are_shifted_and_timesteps_a_thousand_times_that(schedule: FlowMatchSchedule) -> None:
    N, s = schedule.num_inference_steps, schedule.shift
    for i, (sigma, t) in enumerate(zip(schedule.sigmas.tolist(), schedule.timesteps.tolist(), strict=True)):
        u = 1 - i / N
        assert sigma == pytest.approx(s * u / (1 + (s - 1) * u), rel=1e-12)
        assert t == pytest.approx(1000 * sigma, rel=1e-15)


def test_the_reference_schedule() -> None:
    schedule = FlowMatchSchedule(8, 5.0)
    fractions = [1, 35 / 36, 15 / 16, 25 / 28, 5 / 6, 3 / 4, 5 / 8, 5 / 12, 0]
    assert schedule.sigmas.tolist() == pytest.approx(fractions, abs=1e-15)
    assert schedule == FlowMatchSchedule()


def test_shift_one_is_uniform() -> None:
    assert FlowMatchSchedule(4, 1.0).sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(("steps", "shift"), [(8, 5.0), (50, 3.0), (1, 5.0)])
def test_equals_the_scheduler_of_diffsynth(steps: int, shift: float) -> None:
    """Compare without the last sigma: diffsynth omits it, and its last step goes to 0."""
    theirs = FlowMatchScheduler("Wan")
    theirs.set_timesteps(num_inference_steps=steps, shift=shift)
    ours = FlowMatchSchedule(steps, shift)
    torch.testing.assert_close(ours.sigmas[:-1].float(), theirs.sigmas, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.timesteps[:-1].float(), theirs.timesteps, atol=1e-3, rtol=0)
    latents, velocity = torch.randn(2, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(theirs.timesteps):
        expected = theirs.step(velocity, t, latents)
        torch.testing.assert_close(ours.step(latents, velocity, i), expected, atol=1e-6, rtol=1e-6)


@given(SCHEDULES, st.data())
@settings(max_examples=50, deadline=None)
def test_a_step_is_eulers(schedule: FlowMatchSchedule, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, schedule.num_inference_steps - 1))
    latents, velocity = torch.randn(2, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(i))
    stepped = schedule.step(latents, velocity, i)
    expected = latents.double() + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * velocity.double()
    assert stepped.dtype == latents.dtype
    torch.testing.assert_close(stepped.double(), expected, atol=1e-6, rtol=0)


def test_steps_along_the_true_velocity_arrive() -> None:
    """Use flow matching: with `x = (1 - sigma) clean + sigma noise` the velocity is `noise - clean` everywhere."""
    clean, noise = torch.randn(2, 1, 4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    schedule, x = FlowMatchSchedule(), noise
    for i in range(schedule.num_inference_steps):
        x = schedule.step(x, noise - clean, i)
    torch.testing.assert_close(x, clean, atol=1e-12, rtol=0)


def test_high_noise_steps() -> None:
    schedule = FlowMatchSchedule(8, 5.0)
    assert schedule.high_noise_steps(0.9) == 3
    assert schedule.high_noise_steps(15 / 16) == 3, "the boundary itself belongs to the high-noise expert"
    assert schedule.high_noise_steps(15 / 16 + 1e-9) == 2
    assert schedule.high_noise_steps(1.0) == 1
    assert schedule.high_noise_steps(0.0) == 8, "the last sigma, 0, is not a step"


@pytest.mark.parametrize("steps", [0, -1])
def test_a_schedule_needs_a_step(steps: int) -> None:
    with pytest.raises(ConfigError, match=f"num_inference_steps.*{steps}"):
        FlowMatchSchedule(steps)


@pytest.mark.parametrize("shift", [0.0, -5.0, math.nan, math.inf])
def test_a_shift_is_positive_and_finite(shift: float) -> None:
    with pytest.raises(ConfigError, match="shift"):
        FlowMatchSchedule(8, shift)
