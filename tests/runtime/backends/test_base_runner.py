"""What all runners share: they check inputs and live tensors, run one call at a time, and distinguish failures."""

import threading
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from frostline.errors import EngineError, EngineMemoryError, InputError, ShapeError
from frostline.runtime.backends import backend_names, get_backend
from frostline.runtime.backends.base.backend import Backend
from frostline.runtime.backends.base.runner import EngineRunner
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, TensorSpec


class Doubling(EngineRunner):
    """Double x and add the live tensor, or raise `failure`."""

    library_name = "Doubler"
    out_of_memory = ("no room",)
    failure: BaseException | None = None

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.failure is not None:
            raise self.failure
        return {"y": 2 * inputs["x"] + self._network.live["live"]}


@pytest.fixture
def network() -> Network:
    x = TensorSpec("x", (Dimension("n", 1, 2, 64), 4))
    live = TensorSpec("live", (Dimension("rank", 1, 1, 4),))
    return Network("doubled", nn.Linear(4, 4), (x,), ("y",), {"live": torch.ones(1)}, (live,))


def test_every_backend_has_the_one_shape() -> None:
    for name in backend_names():
        backend = get_backend(name)
        assert isinstance(backend, Backend)
        assert type(backend).load is Backend.load
        assert backend.packages
        assert backend.install
        assert backend.precisions <= {"fp32", "fp16", "bf16"}


def test_inputs_are_checked(network: Network) -> None:
    runner = Doubling(network)
    torch.testing.assert_close(runner(x=torch.ones(2, 4))["y"], torch.full((2, 4), 3.0))
    with pytest.raises(InputError, match="lacks its input x"):
        runner()
    with pytest.raises(InputError, match="has no input y"):
        runner(x=torch.ones(2, 4), y=torch.ones(1))
    with pytest.raises(ShapeError, match="input x has shape"):
        runner(x=torch.ones(65, 4))
    with pytest.raises(InputError, match=r"input x is torch\.float16"):
        runner(x=torch.ones(2, 4).half())
    with pytest.raises(InputError, match="input x is on meta, the engine is on cpu"):
        runner(x=torch.ones(2, 4, device="meta"))


@pytest.mark.parametrize(
    ("live", "message"),
    [
        (torch.ones(5), r"live has shape \(5,\), engines support \(1,\) to \(4,\)"),
        (torch.ones(1).double(), r"input live is torch\.float64"),
        (torch.ones(1, device="meta"), "input live is on meta"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_live_tensors_are_checked_when_it_is_loaded_and_where_they_were_replaced(
    live: Tensor, message: str, network: Network
) -> None:
    runner, own = Doubling(network), network.live["live"]
    assert isinstance(network.live, dict)
    network.live["live"] = live
    for _ in range(2):
        with pytest.raises(EngineError, match=message):
            runner(x=torch.ones(2, 4))
    with pytest.raises(EngineError, match=message):
        Doubling(network)
    network.live["live"] = own
    runner(x=torch.ones(2, 4))


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (RuntimeError("broken kernel"), EngineError, "Doubler failed on doubled: broken kernel"),
        (ValueError("odd"), EngineError, "Doubler failed on doubled: odd"),
        (RuntimeError("there is no room"), EngineMemoryError, "Doubler failed on doubled: there is no room"),
        (MemoryError(), EngineMemoryError, "Doubler failed on doubled: "),
        (torch.OutOfMemoryError("CUDA out of memory"), EngineMemoryError, "Doubler failed on doubled: CUDA"),
        (EngineError("its own words"), EngineError, "^its own words$"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=repr,
)
def test_failures_are_told_apart(
    failure: BaseException, kind: type[BaseException], message: str | None, network: Network
) -> None:
    runner = Doubling(network)
    runner.failure = failure
    with pytest.raises(kind, match=message) as raised:
        runner(x=torch.ones(2, 4))
    assert type(raised.value) is kind
    runner.failure = None
    runner(x=torch.ones(2, 4))


@pytest.mark.parametrize("alone", [True, False])
def test_calls_wait_for_each_other_where_the_engine_takes_one(
    alone: bool, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Doubling, "one_call_at_a_time", alone)
    both_are_in, met = threading.Barrier(2), list[bool]()

    class Meeting(Doubling):
        def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            try:
                both_are_in.wait(timeout=0.5 if alone else 30)
                met.append(True)
            except threading.BrokenBarrierError:
                met.append(False)
            return super()._run(inputs)

    runner = Meeting(network)
    threads = [threading.Thread(target=runner, kwargs={"x": torch.ones(2, 4)}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == [not alone] * 2
