"""Launches at fixed shapes, recorded once as CUDA graphs and replayed: one launch instead of one for each kernel."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.errors import EngineError, EngineMemoryError

log = logging.getLogger(__name__)

Launch = Callable[[Mapping[str, Tensor], torch.cuda.Stream], dict[str, Tensor]]

# A shape whose recording was dropped this many times is not recorded again.
_ENOUGH_DROPS = 2
# Shapes whose last use is remembered; a face detector's never end.
_REMEMBERED_SHAPES = 1024


@dataclass(frozen=True)
class _Recording:
    """launch: whose state belongs to the graph, and must not change while it is used."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    launch: Launch


class CudaGraphs:
    """Calls launches, from the second call of a shape on as a replay.

    A replay reads and writes the memory that it was recorded with: inputs are copied into it and outputs out of it, so
    that outputs are the caller's own. Whatever else the launch reads (weights, live tensors) is read in place.

    Not thread-safe: the caller holds a lock.

    Args:
        new_launch: makes what enqueues the work on a stream, from named inputs to freshly allocated outputs, without
            waiting for the device. Each recording has one of its own: TensorRT's contexts have a state, which a launch
            at another shape changes under the graphs that were recorded before (NVIDIA/TensorRT#3798).
        stream: where everything is launched; not the default stream.
        limit: recordings that are kept; each holds inputs, outputs and scratch of its shape.
    """

    def __init__(self, new_launch: Callable[[], Launch], stream: torch.cuda.Stream, limit: int = 4) -> None:
        self._new_launch = new_launch
        self._launch = new_launch()
        self._stream = stream
        self._limit = limit
        self._calls = 0
        self._last_use: OrderedDict[Hashable, int] = OrderedDict()
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._drops: Counter[Hashable] = Counter()
        self._refused = False

    def __call__(self, inputs: Mapping[str, Tensor], depends: Hashable = None) -> dict[str, Tensor]:
        """Compute the outputs, ready on torch's current stream.

        Args:
            depends: what a recording depends on besides the input shapes, such as addresses that the launch binds.
        """
        key = (depends, *((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(inputs.items())))
        recording = self._recordings.get(key)
        if recording is None and self._worth_recording(key):
            recording = self._record(key, inputs)
        outputs = self._launch(inputs, self._stream) if recording is None else self._replay(recording, inputs)
        self._note_use(key)
        return outputs

    def launch(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs without a recording."""
        return self._launch(inputs, self._stream)

    def _note_use(self, key: Hashable) -> None:
        self._calls += 1
        self._last_use[key] = self._calls
        self._last_use.move_to_end(key)
        if key in self._recordings:
            self._recordings.move_to_end(key)
        while len(self._last_use) > _REMEMBERED_SHAPES:
            self._last_use.popitem(last=False)

    def _worth_recording(self, key: Hashable) -> bool:
        """Return whether to record a shape: on its second call, if both came after the last of the shape it replaces.

        If there are more shapes than `limit`, they then do not keep replacing each other.
        """
        before = self._last_use.get(key)
        if self._refused or before is None or self._drops[key] >= _ENOUGH_DROPS:
            return False
        if len(self._recordings) < self._limit:
            return True
        return self._last_use.get(next(iter(self._recordings)), 0) < before

    def _record(self, key: Hashable, inputs: Mapping[str, Tensor]) -> _Recording | None:
        """Record at the shapes of `inputs`, dropping the least recently used recording; None if that fails."""
        while len(self._recordings) >= self._limit:
            dropped, _ = self._recordings.popitem(last=False)
            self._drops[dropped] += 1
        try:
            recording = self._recorded(inputs)
        except (torch.OutOfMemoryError, EngineMemoryError) as error:
            log.warning("no CUDA graph is recorded at these shapes, each kernel is launched: %s", error)
            self._drops[key] = _ENOUGH_DROPS
            return None
        except (RuntimeError, EngineError) as error:
            log.warning("no CUDA graph is recorded, every call launches each kernel: %s", error)
            self._refused = True
            return None
        self._recordings[key] = recording
        return recording

    def _recorded(self, inputs: Mapping[str, Tensor]) -> _Recording:
        own, launch, graph = _copies(inputs), self._new_launch(), torch.cuda.CUDAGraph()
        # The first launch at a shape may allocate and compile, which a recording must not.
        launch(own, self._stream)
        # Other threads may allocate meanwhile: only what this one does may end the recording.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = launch(own, self._stream)
        return _Recording(graph, own, outputs, launch)

    def _replay(self, recording: _Recording, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # The outputs are allocated where they will be used and freed, and written on the recording's own stream: the
        # next replay, of whichever thread, comes after that.
        outputs = {name: torch.empty_like(tensor) for name, tensor in recording.outputs.items()}
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for name, tensor in inputs.items():
                    recording.inputs[name].copy_(tensor)
                recording.graph.replay()
                for name, output in outputs.items():
                    output.copy_(recording.outputs[name])
        finally:
            current.wait_stream(self._stream)
        return outputs


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        for name, tensor in tensors.items()
    }
