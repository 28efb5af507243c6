"""ONNX Runtime: one session for all threads, and live tensors that are looked up at each call."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from small_model import (
    assert_follows_the_trainer,
    assert_outputs_are_the_callers,
    assert_replaced_tensors_are_followed,
    assert_threads_are_served,
    network_of,
)

from frostline.errors import EngineError, EngineMemoryError
from frostline.runtime.backends.onnxruntime import OnnxRuntimeRunner
from frostline.runtime.stage import Network

Source = Callable[..., Path]


@pytest.fixture(scope="module")
def denoiser() -> Network:
    return network_of("denoiser", "denoiser")


@pytest.fixture(scope="module")
def runner(denoiser: Network, onnx_source: Source) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(onnx_source("denoiser", "denoiser"), denoiser, torch.device("cpu"))


def test_threads_are_served_at_shapes_of_their_own(denoiser: Network, runner: OnnxRuntimeRunner) -> None:
    assert_threads_are_served(denoiser, runner)


def test_live_tensors_that_were_replaced_are_followed(denoiser: Network, runner: OnnxRuntimeRunner) -> None:
    assert_replaced_tensors_are_followed(denoiser, runner)


def test_follows_the_trainer(denoiser: Network, runner: OnnxRuntimeRunner) -> None:
    assert_follows_the_trainer(denoiser, runner)
    assert_outputs_are_the_callers(denoiser, runner)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (
            "[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 57",
            EngineMemoryError,
        ),
        ("std::bad_alloc", EngineMemoryError),
        ("[ONNXRuntimeError] : 1 : FAIL : the allocation of shapes is wrong", EngineError),
    ],
)
def test_memory_that_ran_out_is_no_verdict(
    message: str, kind: type[EngineError], denoiser: Network, runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: object, binding: object, options: object = None) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", fail)
    with pytest.raises(EngineError) as raised:
        runner(**denoiser.samples("opt"))
    assert type(raised.value) is kind
