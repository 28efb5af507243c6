"""The clock: which stages ran, on which backend, and for how long."""

import time

from frostline.runtime.stage_timer import StageClock


def test_uses_add_up_by_name_until_they_are_read() -> None:
    clock = StageClock()
    with clock.collect() as collected:
        for use, backend in (("first", "torch"), ("first", "onnxruntime"), ("second", "torch"), ("first", "torch")):
            with clock.measure(use, backend):
                time.sleep(0.002)
    times = collected.read()
    assert {name: (spent.backend, spent.calls) for name, spent in times.items()} == {
        "first": ("torch, onnxruntime", 3),
        "second": ("torch", 1),
    }
    assert {name: calls for name, (calls, _) in times["first"].by_backend.items()} == {"torch": 2, "onnxruntime": 1}
    assert times["first"].milliseconds == sum(spent for _, spent in times["first"].by_backend.values()) >= 6
    assert collected.read() == {}


def test_each_who_collects_gets_the_uses_of_the_own_block_whoever_else_reads() -> None:
    clock = StageClock()
    with clock.collect() as outer:
        with clock.measure("before", "torch"):
            pass
        with clock.collect() as inner, clock.measure("within", "torch"):
            pass
        assert inner.read().keys() == {"within"}
    with clock.measure("after", "torch"):
        pass
    assert outer.read().keys() == {"before", "within"}
