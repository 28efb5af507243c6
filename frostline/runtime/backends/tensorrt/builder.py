"""Compile an ONNX file to a plan."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from frostline.atomic_io import atomic_write
from frostline.errors import EngineError
from frostline.runtime.backends.base.options import BuildProgress
from frostline.runtime.interruptible import run_interruptibly
from frostline.runtime.stage import Network

from .messages import Messages

log = logging.getLogger(__name__)

_Steps = SimpleQueue[tuple[str, int, int]]


class PlanBuilder:
    """Compile one network.

    The build runs in its own thread, because a build step may take a minute, during which Python cannot handle signals.

    Args:
        trt: the module, `tensorrt` or `tensorrt_rtx`.
        capabilities: the GPUs to build for, as members of `trt.ComputeCapability`; empty if the module builds for the
            GPU of this machine.
        timing_cache: file with the builder's measurements, which is read before the build and written afterwards.
    """

    def __init__(self, trt: Any, capabilities: Sequence[Any] = (), timing_cache: Path | None = None) -> None:
        self._trt = trt
        self._capabilities = capabilities
        self._timing_cache = timing_cache

    def build(self, network: Network, source: Path, progress: BuildProgress | None = None) -> Any:
        """Return the plan of `source` for shapes within the network's range: TensorRT's own memory, readable as bytes.

        Args:
            progress: called in this thread.
        Raises:
            EngineError: TensorRT cannot parse or compile the file; the message includes TensorRT's own message.
        """
        steps: _Steps = SimpleQueue()
        cancelled = threading.Event()
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

        def work() -> Any:
            # The current GPU is a property of the thread.
            with nullcontext() if gpu is None else torch.cuda.device(gpu):
                return self._compile(network, source, steps, cancelled)

        def tell() -> None:
            while progress is not None:
                try:
                    progress(*steps.get_nowait())
                except Empty:
                    return

        return run_interruptibly(work, cancelled, tell)

    def _compile(self, network: Network, source: Path, steps: _Steps, cancelled: threading.Event) -> Any:
        trt, messages = self._trt, Messages(self._trt)
        builder = trt.Builder(messages.logger)
        graph = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(trt, graph, source, messages)
        config = builder.create_builder_config()
        self._configure(config)
        _add_profile(builder, graph, config, network)
        monitor = _new_monitor(trt, messages, steps, cancelled)
        config.progress_monitor = monitor
        cache_accepted = _read_timing_cache(config, self._timing_cache)
        plan = builder.build_serialized_network(graph, config)
        messages.check()
        if plan is None:
            raise messages.error(f"{trt.__name__} cannot build {network.name}")
        # A timing cache of another GPU or version is not overwritten.
        if cache_accepted:
            _write_timing_cache(config, self._timing_cache)
        return plan

    def _configure(self, config: Any) -> None:
        trt = self._trt
        # TF32 has a mantissa of 10 bits: fp32 engines would differ from PyTorch.
        config.clear_flag(trt.BuilderFlag.TF32)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # Otherwise an engine allocates the scratch memory of its largest shapes at every call.
        feature = getattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10", None)
        if feature is not None:
            config.set_preview_feature(feature, True)
        if self._capabilities:
            config.num_compute_capabilities = len(self._capabilities)
            for index, capability in enumerate(self._capabilities):
                config.set_compute_capability(capability, index)


def _parse(trt: Any, graph: Any, source: Path, messages: Messages) -> None:
    parser = trt.OnnxParser(graph, messages.logger)
    if not parser.parse_from_file(str(source)):
        messages.check()
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        found = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}".strip() for error in errors)
        what = f"{trt.__name__} cannot parse {source.stem}"
        raise EngineError(f"{what}: {found}") if found else messages.error(what)
    for index in range(graph.num_layers):
        layer = graph.get_layer(index)
        if layer.type.name == "ATTENTION_OUTPUT":
            # Only in opset 23. Allow unfused attention: no fused kernel supports fp32 with dynamic shapes.
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True


def _add_profile(builder: Any, graph: Any, config: Any, network: Network) -> None:
    specs = {spec.name: spec for spec in (*network.inputs, *network.live_specs)}
    profile = builder.create_optimization_profile()
    for index in range(graph.num_inputs):
        entry = graph.get_input(index)
        if -1 in tuple(entry.shape):
            spec = specs[entry.name]
            profile.set_shape(entry.name, spec.shape_at("min"), spec.shape_at("opt"), spec.shape_at("max"))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT rejects the shapes of {network.name}")


def _read_timing_cache(config: Any, path: Path | None) -> bool:
    """Return whether the builder uses a timing cache that may be written to `path`."""
    if path is None:
        return False
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        log.warning("the timing cache %s is from another GPU or version: it is neither used nor changed", path)
        return False
    return True


def _write_timing_cache(config: Any, path: Path | None) -> None:
    cache = config.get_timing_cache()
    if path is not None and cache is not None:
        with atomic_write(path) as part:
            part.write_bytes(cache.serialize())


def _new_monitor(trt: Any, messages: Messages, steps: _Steps, cancelled: threading.Event) -> Any:
    """Return a monitor that reports the progress, and stops a build that was cancelled or whose callback failed."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lengths: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, length: int) -> None:
            messages.guard(lambda: self._lengths.__setitem__(phase, length), None)

        def step_complete(self, phase: str, step: int) -> bool:
            messages.guard(lambda: steps.put((phase, step + 1, self._lengths.get(phase, 0))), None)
            return not cancelled.is_set() and messages.raised is None

        def phase_finish(self, phase: str) -> None:
            messages.guard(lambda: self._lengths.pop(phase, None), None)

    return Monitor()
