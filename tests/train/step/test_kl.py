"""The weight of the KL term is adapted to its target."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.train.step.kl import adapted_weight

POSITIVE = st.floats(1e-6, 1e6)


@pytest.mark.parametrize(
    ("kl_loss", "factor"), [(0.0, 0.98), (1.0, 1.0), (1.1, 1.01), (0.9, 0.99), (1.2, 1.02), (50.0, 1.02)]
)
def test_the_change_is_that_of_the_paper(kl_loss: float, factor: float) -> None:
    """Compute the change of Ziegler et al. 2019, section 2.2, with a target of 2."""
    assert adapted_weight(0.5, 2 * kl_loss, 2.0) == pytest.approx(0.5 * factor)


@given(POSITIVE, POSITIVE, POSITIVE)
def test_it_rises_above_the_target_and_falls_below(weight: float, kl_loss: float, target: float) -> None:
    after = adapted_weight(weight, kl_loss, target)
    assert 0.98 * weight * (1 - 1e-12) <= after <= 1.02 * weight * (1 + 1e-12)
    assert (after >= weight) == (kl_loss >= target) or after == pytest.approx(weight)
