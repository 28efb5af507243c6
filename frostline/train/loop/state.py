"""Collect and restore the state of a training run besides its weights: optimizer, schedule and random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

# Name and number of words of the state of numpy's Mersenne twister.
_NUMPY_ALGORITHM, _NUMPY_WORDS = "MT19937", 624
_NumpyState = tuple[str, np.ndarray, int, int, float]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """Return the optimizer state of every parameter, as `name/quantity`.

    Args:
        names: names of the parameters, by `id`.
    """
    tensors = {}
    for parameter, state in optimizer.state.items():
        for quantity, value in state.items():
            tensors[f"{names[id(parameter)]}/{quantity}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Restore the result of `optimizer_tensors`.

    Raises:
        ValueError: the tensors belong to other parameters.
    """
    optimizer.state.clear()
    for key, tensor in tensors.items():
        name, _, quantity = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or (tensor.ndim and tensor.shape != parameter.shape):
            raise ValueError(f"the optimizer state {key} does not match the model")
        # Adam stores its step count on the CPU, independent of the parameter's device.
        device = parameter.device if tensor.ndim else torch.device("cpu")
        optimizer.state[parameter][quantity] = tensor.to(device, copy=True)


def random_tensors() -> dict[str, Tensor]:
    """Return the states of all random generators of this process: Python, numpy, torch on the CPU and on every GPU."""
    version, words, gauss = random.getstate()
    algorithm, numpy_words, position, has_gauss, cached_gauss = cast(_NumpyState, np.random.get_state(legacy=True))
    assert (algorithm, len(numpy_words), version) == (_NUMPY_ALGORITHM, _NUMPY_WORDS, 3)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(numpy_words.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached_gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda_{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


@contextmanager
def unchanged_random() -> Iterator[None]:
    """Restore the state of the random generators after the block."""
    before = random_tensors()
    try:
        yield
    finally:
        restore_random(before)


def restore_random(tensors: dict[str, Tensor]) -> None:
    """Restore the result of `random_tensors`; GPUs that this machine does not have are skipped."""
    gauss = tensors["python_gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), gauss[0] if gauss else None))
    words = tensors["numpy"].numpy().astype(np.uint32)
    position, has_gauss = tensors["numpy_position"].tolist()
    np.random.set_state((_NUMPY_ALGORITHM, words, position, has_gauss, tensors["numpy_gauss"].item()))
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda_{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda_{index}"], index)


def restore_schedule(scheduler: LambdaLR, updates: int) -> None:
    """Set the learning rate to its value after this number of updates."""
    rates = [base * factor(updates) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    place = {"last_epoch": updates, "_step_count": updates + 1, "_last_lr": rates}
    scheduler.load_state_dict({**scheduler.state_dict(), **place})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
