"""The workers of a training run, when Ray starts them and when it restarts them; tested without a cluster."""

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from frostline.cluster import train_worker
from frostline.cluster.supervisor import RunState
from frostline.errors import ConfigError, FrostlineError
from frostline.train import launch
from frostline.train.loop import checkpoint
from frostline.train.settings import RunSettings


class Remote:
    """An actor in this process. Its methods are called with `remote`, and return what `ray.get` returns."""

    def __init__(self, actor: object) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


Start = Callable[..., Any]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunState, Start, list[str | None]]:
    """Return the state of a run, the function `start(resume)` of a worker, and the list of the values of `resume`.

    The list contains the values that the worker passed to `run_training`.
    """
    state, told = RunState(), list[str | None]()
    settings = RunSettings(output_dir=tmp_path / "run")

    def run_training(settings: object, resume: str | None, progress: object, supervisor: Any) -> str:
        told.append(resume)
        if resume == "wrong":
            raise ConfigError("a wrong setting")
        supervisor.begun()
        return "outcome"

    context = SimpleNamespace(get_world_rank=lambda: 0)
    monkeypatch.setattr(train_worker.ray, "get", lambda value: value)
    monkeypatch.setattr(train_worker.ray, "get_gpu_ids", list)
    monkeypatch.setattr(train_worker.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(launch, "run_training", run_training)
    monkeypatch.chdir(tmp_path)
    # The worker sets these variables; `monkeypatch` restores them afterwards.
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.setenv(name, "")

    def start(resume: str | None) -> Any:
        config = {"settings": settings, "resume": resume, "folder": str(tmp_path), "state": Remote(state)}
        return train_worker.work(config)

    return state, start, told


def test_workers_that_start_again_go_on(
    started: tuple[RunState, Start, list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, start, told = started
    assert start(None) == "outcome"
    # No checkpoint existed when a worker was lost, so `latest` starts from the beginning.
    assert start(None) == "outcome"
    # A run that started from the checkpoint of another run starts from it again, until it has its own checkpoint.
    assert start("other/checkpoint-8") == "outcome"
    monkeypatch.setattr(checkpoint, "latest_intact", lambda folder: folder / "checkpoint-2")
    assert start("other/checkpoint-8") == "outcome"
    assert told == [None, "latest", "other/checkpoint-8", "latest"]


def test_before_the_run_began_a_start_is_the_first(started: tuple[RunState, Start, list[str | None]]) -> None:
    state, start, told = started
    state.has_begun = lambda: False  # type: ignore[method-assign]
    start(None)
    start(None)
    assert told == [None, None]


def test_what_is_wrong_with_a_run_is_not_tried_again(started: tuple[RunState, Start, list[str | None]]) -> None:
    state, start, told = started
    with pytest.raises(FrostlineError):
        start("wrong")
    assert start("wrong") is None
    assert told == ["wrong"] and str(state.failure()) == "a wrong setting"


def test_the_loop_learns_of_signals_and_of_nodes_that_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunState()
    infos = iter([None, ["a"], ["a"], ["a", "b"], None])
    monkeypatch.setattr(train_worker.ray, "get", lambda value: value)

    def info() -> Any:
        nodes = next(infos)
        return None if nodes is None else SimpleNamespace(preempted_node_ids=nodes)

    monkeypatch.setattr(train_worker.ray.train, "get_preemption_info", info)
    supervisor = train_worker._Supervisor(Remote(state))
    assert [supervisor.save_asked() for _ in range(5)] == [False, True, False, True, False]
    assert supervisor.stop_asked() is None
    state.ask_to_stop(int(signal.SIGTERM))
    assert supervisor.stop_asked() is signal.SIGTERM
