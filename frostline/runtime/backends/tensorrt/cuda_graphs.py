"""Record launches at fixed shapes as CUDA graphs and replay them: one launch instead of one for each kernel."""

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

# A shape is not recorded again after its recording was dropped this many times.
_ENOUGH_DROPS = 2
# Maximum number of shapes whose last use is stored: a face detector has many different shapes.
_REMEMBERED_SHAPES = 1024


@dataclass(frozen=True)
class _Recording:
    """A recorded graph.

    Attributes:
        launch: the launch whose state belongs to the graph; it must not change while the graph is in use.
    """

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    launch: Launch


class CudaGraphs:
    """Call launches; from the second call of a shape on, replay a recording.

    A replay reads and writes the memory that it was recorded with. Inputs are therefore copied into that memory and
    outputs out of it, and the caller owns the outputs. Everything else that the launch reads (weights, live tensors) is
    read in place.

    Not thread-safe: the caller must hold a lock.

    Args:
        new_launch: returns a function that enqueues the work on a stream, from named inputs to newly allocated outputs,
            without waiting for the device. Each recording needs its own: a launch at another shape changes the state of
            a TensorRT context, also for graphs that were recorded before (NVIDIA/TensorRT#3798).
        stream: the stream for all launches; not the default stream.
        limit: maximum number of recordings; each keeps the inputs, outputs and scratch memory of its shape.
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
        """Return the outputs, ready on torch's current stream.

        Args:
            depends: further values that a recording depends on, such as addresses that the launch binds.
        """
        key = (depends, *((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(inputs.items())))
        recording = self._recordings.get(key)
        if recording is None and self._worth_recording(key):
            recording = self._record(key, inputs)
        outputs = self._launch(inputs, self._stream) if recording is None else self._replay(recording, inputs)
        self._note_use(key)
        return outputs

    def launch(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs without using a recording."""
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
        """Return whether to record a shape: on its second call, if both calls came after the last call of the shape
        that it replaces.

        This prevents shapes from constantly replacing each other if there are more of them than `limit`.
        """
        before = self._last_use.get(key)
        if self._refused or before is None or self._drops[key] >= _ENOUGH_DROPS:
            return False
        if len(self._recordings) < self._limit:
            return True
        return self._last_use.get(next(iter(self._recordings)), 0) < before

    def _record(self, key: Hashable, inputs: Mapping[str, Tensor]) -> _Recording | None:
        """Record at the shapes of `inputs`, dropping the least recently used recording; None if recording fails."""
        while len(self._recordings) >= self._limit:
            dropped, _ = self._recordings.popitem(last=False)
            self._drops[dropped] += 1
        try:
            recording = self._recorded(inputs)
        except (torch.OutOfMemoryError, EngineMemoryError) as error:
            log.warning("cannot record a CUDA graph at these shapes; each kernel is launched separately: %s", error)
            self._drops[key] = _ENOUGH_DROPS
            return None
        except (RuntimeError, EngineError) as error:
            log.warning("cannot record CUDA graphs; each kernel is launched separately in every call: %s", error)
            self._refused = True
            return None
        self._recordings[key] = recording
        return recording

    def _recorded(self, inputs: Mapping[str, Tensor]) -> _Recording:
        own, launch, graph = _copies(inputs), self._new_launch(), torch.cuda.CUDAGraph()
        # The first launch at a shape may allocate and compile, which is not allowed while recording.
        launch(own, self._stream)
        # Other threads may allocate in the meantime: only actions of this thread may invalidate the recording.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = launch(own, self._stream)
        return _Recording(graph, own, outputs, launch)

    def _replay(self, recording: _Recording, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Outputs are allocated on the stream where they are used and freed, but written on the recording's stream; the
        # next replay, from any thread, is ordered after that.
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
