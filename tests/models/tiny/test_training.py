"""A training phase of the tiny models: if it is interrupted and resumed, the result is the same."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from frostline.models.tiny.training import Phase, psnr, run_phase

STEPS = 250  # checkpoints at 100, 200 and 250


def toy_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


def run(
    model: nn.Module, work: Path, steps: int = STEPS, before_step: Callable[[int], None] = lambda step: None
) -> int:
    """Run the phase and return how many steps it took."""
    taken = 0

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        nonlocal taken
        before_step(step)
        taken += 1
        x = torch.randn(16, 4, generator=generator)
        return (model(x) - x.flip(-1)).pow(2).mean()

    phase = Phase("toy", model, list(model.parameters()), steps, learning_rate=1e-2, warmup=10)
    run_phase(phase, loss_at, dict, work)
    return taken


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("interrupted_at", [50, 130, 249])
def test_resumed_it_ends_where_it_would_have_ended(tmp_path: Path, interrupted_at: int) -> None:
    def interrupt(step: int) -> None:
        if step == interrupted_at:
            raise KeyboardInterrupt

    whole, halted, resumed = toy_model(), toy_model(), toy_model()
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    assert run(whole, tmp_path / "whole") == STEPS
    with pytest.raises(KeyboardInterrupt):
        run(halted, tmp_path / "parts", before_step=interrupt)
    torch.rand(5)  # the state of the global generator is different after a restart
    assert run(resumed, tmp_path / "parts") == STEPS - interrupted_at // 100 * 100
    assert not torch.equal(weights(halted), weights(whole))
    assert torch.equal(weights(resumed), weights(whole))


def test_a_finished_phase_only_loads_its_result(tmp_path: Path) -> None:
    first, second = toy_model(), toy_model()
    run(first, tmp_path)
    assert run(second, tmp_path) == 0
    assert torch.equal(weights(first), weights(second))


def test_it_learns(tmp_path: Path) -> None:
    model, x = toy_model(), torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    before = (model(x) - x.flip(-1)).pow(2).mean()
    run(model, tmp_path)
    assert (model(x) - x.flip(-1)).pow(2).mean() < before / 3


def test_a_checkpoint_cut_short_is_never_seen(tmp_path: Path) -> None:
    """Ignore the file that a crash within `torch.save` leaves, because it has another name."""
    whole, resumed = toy_model(), toy_model()
    run(whole, tmp_path)
    (tmp_path / "toy.pt").unlink()
    (tmp_path / "toy.partial").write_bytes(b"PK")
    assert run(resumed, tmp_path) == STEPS
    assert torch.equal(weights(resumed), weights(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["toy.pt"]


def test_the_learning_rate_warms_up_and_falls() -> None:
    phase = Phase("toy", nn.Linear(1, 1), [], steps=100, learning_rate=2.0, warmup=10)
    rates = [phase.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates.index(max(rates)) == 9
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[9:]))
    assert phase.learning_rate_at(100) == pytest.approx(0.06)


def test_psnr() -> None:
    truth = torch.zeros(2, 3, 4, 4)
    assert psnr(truth + 0.1, truth) == pytest.approx(20, abs=1e-4)
    assert psnr(truth + 0.01, truth) == pytest.approx(40, abs=1e-4)
