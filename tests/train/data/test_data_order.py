"""The order of samples: each once per epoch, the same for any number of processes, and from any start position."""

from itertools import chain, islice

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from frostline.train.data.data_order import DataOrder

SIZES = st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))


def dealt(order: DataOrder, batches: int) -> list[int]:
    return [index for batch in islice(order.batches(), batches) for index in batch]


@given(SIZES)
@settings(max_examples=50, deadline=None)
def test_every_epoch_has_every_sample_once(sizes: tuple[int, int, int, int]) -> None:
    samples, batch, _, seed = sizes
    stream = dealt(DataOrder(samples, batch, seed), 3 * samples)
    for epoch in range(3):
        assert sorted(stream[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


@given(SIZES, st.integers(0, 7))
@settings(max_examples=50, deadline=None)
def test_processes_take_turns(sizes: tuple[int, int, int, int], steps: int) -> None:
    samples, batch, processes, seed = sizes
    together = list(islice(DataOrder(samples, batch * processes, seed).batches(), steps))
    parts = [islice(DataOrder(samples, batch, seed, processes, p).batches(), steps) for p in range(processes)]
    assert [[*chain(*turn)] for turn in zip(*parts, strict=True)] == together


@given(SIZES, st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_it_goes_on_from_any_place(sizes: tuple[int, int, int, int], steps: int) -> None:
    samples, batch, processes, seed = sizes
    order = DataOrder(samples, batch, seed, processes, processes - 1)
    later = order.at(steps * batch * processes)
    assert dealt(order, steps + 4)[steps * batch :] == dealt(later, 4)


def test_it_is_the_order_of_a_plain_loader() -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(list(range(8)), batch_size=2, shuffle=True, generator=generator)
    epochs = [batch.tolist() for _ in range(3) for batch in loader]
    assert list(islice(DataOrder(8, 2, 5).batches(), 12)) == epochs
