"""The clock: what was used, on which backend, for how long."""

import time

from frostline.runtime.stage_timer import StageClock


def test_uses_add_up_by_name_until_they_are_read() -> None:
    clock = StageClock()
    for use, backend in (("first", "torch"), ("first", "onnxruntime"), ("second", "torch"), ("first", "torch")):
        with clock.measure(use, backend):
            time.sleep(0.002)
    times = clock.read()
    assert {name: (spent.backend, spent.calls) for name, spent in times.items()} == {
        "first": ("torch, onnxruntime", 3),
        "second": ("torch", 1),
    }
    assert times["first"].milliseconds >= 6
    assert clock.read() == {}
