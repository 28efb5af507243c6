"""Launches at fixed shapes, recorded once as CUDA graphs and replayed: one launch instead of one a kernel."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.errors import EngineError

log = logging.getLogger(__name__)

Launch = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class CudaGraphs:
    """Calls `launch`, from the second call of a shape on as a replay.

    A replay reads and writes the memory that it was recorded with: inputs are copied into it and outputs out of it, so
    that outputs are the caller's own. Whatever else the launch reads (weights, live tensors) is read in place.

    Args:
        launch: enqueues the work on torch's current stream, from named inputs to freshly allocated outputs, without
            waiting for the device.
        limit: recordings that are kept, the latest used; each holds inputs, outputs and scratch of its shape.
    """

    def __init__(self, launch: Launch, limit: int = 4) -> None:
        self._launch = launch
        self._limit = limit
        self._seen: set[Hashable] = set()
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._refused = False

    def __call__(self, inputs: Mapping[str, Tensor], depends: Hashable = None) -> dict[str, Tensor]:
        """Outputs for the inputs.

        Args:
            depends: what a recording holds for beside the inputs' shapes, such as addresses that the launch binds.
        """
        key = (depends, *((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(inputs.items())))
        # A shape that comes once, as a last batch does, is not worth a recording.
        if self._refused or key not in self._seen:
            self._seen.add(key)
            return self._launch(inputs)
        recording = self._recordings.get(key) or self._record(inputs)
        if recording is None:
            return self._launch(inputs)
        self._keep(key, recording)
        for name, tensor in inputs.items():
            recording.inputs[name].copy_(tensor)
        recording.graph.replay()
        return {name: tensor.clone() for name, tensor in recording.outputs.items()}

    def _keep(self, key: Hashable, recording: _Recording) -> None:
        self._recordings[key] = recording
        self._recordings.move_to_end(key)
        while len(self._recordings) > self._limit:
            self._recordings.popitem(last=False)

    def _record(self, inputs: Mapping[str, Tensor]) -> _Recording | None:
        """A recording at the shapes of `inputs`, or None, from now on, where the device or the engine refuses."""
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in inputs.items()}
        # After a change of shapes the first launch may allocate and compile, which a recording must not.
        self._launch(own)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = self._launch(own)
        except (RuntimeError, EngineError) as error:
            log.warning("no CUDA graph is recorded, every call launches each kernel: %s", error)
            self._refused = True
            return None
        return _Recording(graph, own, outputs)
