"""Run TensorRT engines, with CUDA graphs for repeated shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from frostline.runtime.backends.base.runner import EngineRunner
from frostline.runtime.stage import Network

from .cuda_graphs import CudaGraphs
from .execution import Execution, can_bind
from .messages import OUT_OF_MEMORY, Messages
from .runtime_cache import RuntimeCache

# Number of shapes of an engine after which newly compiled kernels are no longer stored.
_SHAPES = 1024


class TensorRTRunner(EngineRunner):
    """Run one engine on its own stream, in memory that torch allocates.

    An execution context handles one call at a time, from any stream. Calls are therefore queued, each with its own
    inputs and outputs.

    Args:
        trt: the module, `tensorrt` or `tensorrt_rtx`.
        plan: the engine, as read from a `VerifiedEngine`.
        network: names of inputs and outputs, the range of shapes, and the live tensors.
        device: the GPU of the tensors.
        cache: store for the kernels that TensorRT-RTX compiles at run time.
    Raises:
        EngineError: TensorRT rejects the engine; an EngineMemoryError if memory ran out.
    """

    library_name = "TensorRT"
    out_of_memory = OUT_OF_MEMORY

    def __init__(
        self, trt: Any, plan: bytes, network: Network, device: torch.device, cache: RuntimeCache | None = None
    ) -> None:
        super().__init__(network)
        self._device = device
        self._messages = Messages(trt)
        with self._failures("cannot load"), torch.cuda.device(device):
            self._runtime, self._engine = _deserialize(trt, plan, network.name, self._messages)
            self._contexts = _Contexts(trt, self._engine, network.name, self._messages, cache)
            # On the default stream, TensorRT would synchronise the device, and graphs cannot be recorded.
            self._graphs = CudaGraphs(self._new_execution, torch.cuda.Stream(device))

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        live = tuple(self._network.live.values())
        with torch.cuda.device(self._device):
            if all(can_bind(tensor) for tensor in live):
                outputs = self._graphs(inputs, depends=tuple(tensor.data_ptr() for tensor in live))
            else:
                # Such a tensor is copied at each launch; a recording would keep using one copy.
                outputs = self._graphs.launch(inputs)
            self._contexts.keep_compiled(tuple(tuple(tensor.shape) for tensor in inputs.values()))
        return outputs

    def _new_execution(self) -> Execution:
        return Execution(self._contexts.new(), self._engine, self._network, self._device, self._messages)


class _Contexts:
    """Create execution contexts of an engine, whose scratch memory torch allocates at each launch.

    With its own allocator, TensorRT would permanently reserve what the largest shapes of the profile need.
    """

    def __init__(self, trt: Any, engine: Any, name: str, messages: Messages, cache: RuntimeCache | None) -> None:
        self._engine = engine
        self._name = name
        self._messages = messages
        self._cache = cache
        self._compiled: Any = None
        self._shapes: set[object] = set()
        self._next_write = 1
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        specialization = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is None:
            self._how = strategy
            return
        self._how = config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # TensorRT-RTX compiles kernels for new shapes in the background; a graph would permanently use the slow
        # fallback kernels.
        config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        if cache is not None:
            self._compiled = config.create_runtime_cache()
            content = cache.read()
            if content is not None:
                # False for a cache of another GPU, driver or version, which is then compiled again and replaced.
                self._compiled.deserialize(content)
            config.set_runtime_cache(self._compiled)

    def new(self) -> Any:
        """Return a context that no other launch uses.

        Raises:
            EngineError: TensorRT cannot create one.
        """
        self._messages.forget()
        context = self._engine.create_execution_context(self._how)
        self._messages.check()
        if context is None:
            raise self._messages.error(f"TensorRT cannot prepare {self._name}")
        return context

    def keep_compiled(self, shapes: object) -> None:
        """Store the compiled kernels for the next process, after the 1st, 2nd, 4th, 8th, … new shape."""
        if self._cache is None or self._compiled is None or shapes in self._shapes or len(self._shapes) == _SHAPES:
            return
        self._shapes.add(shapes)
        if len(self._shapes) == self._next_write:
            self._next_write *= 2
            self._cache.write(bytes(self._compiled.serialize()))


def layer_table(trt: Any, plan: bytes, name: str) -> str:
    """Return the engine inspector's information about every layer as JSON.

    Raises:
        EngineError: TensorRT cannot load the plan.
    """
    messages = Messages(trt)
    _runtime, engine = _deserialize(trt, plan, name, messages)
    return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)


def _deserialize(trt: Any, plan: bytes, name: str, messages: Messages) -> tuple[Any, Any]:
    """Return the runtime, which must outlive its engine, and the engine."""
    # `engine_host_code_allowed` stays off, so that a plan cannot contain code that runs on the host.
    runtime = trt.Runtime(messages.logger)
    engine = runtime.deserialize_cuda_engine(plan)
    messages.check()
    if engine is None:
        raise messages.error(f"TensorRT cannot load {name}")
    return runtime, engine
