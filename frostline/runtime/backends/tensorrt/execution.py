"""An execution context of an engine: its bindings, its scratch memory, and its launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from frostline.errors import EngineError
from frostline.runtime.stage import Network

from .messages import Messages

# Alignment that TensorRT requires of every address.
_ALIGNMENT = 256
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


def can_bind(tensor: Tensor) -> bool:
    """Return whether TensorRT can use a tensor in place: it must be dense and aligned."""
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0


class Execution:
    """Enqueue the network, in memory that torch allocates at each launch.

    Not thread-safe. A second launch on another stream must wait for the first to finish.

    Args:
        context: TensorRT's execution context, with user-managed memory.
        engine: the context's engine.
    """

    def __init__(self, context: Any, engine: Any, network: Network, device: torch.device, messages: Messages) -> None:
        self._context = context
        self._engine = engine
        self._network = network
        self._device = device
        self._messages = messages

    def __call__(self, inputs: Mapping[str, Tensor], stream: torch.cuda.Stream) -> dict[str, Tensor]:
        """Enqueue one launch on `stream`, which waits for torch's current stream; the latter then waits for the launch.

        Returns:
            Outputs that were allocated on torch's current stream.
        Raises:
            EngineError: TensorRT rejects the launch; an EngineMemoryError if memory ran out.
        """
        messages = self._messages
        messages.forget()
        # Copies must live until the launch; afterwards the order of the streams protects them.
        kept = [self._bind_input(name, tensor) for name, tensor in {**inputs, **self._network.live}.items()]
        self._infer_shapes()
        kept.append(self._bind_scratch())
        outputs = {name: self._bind_output(name) for name in self._network.outputs}
        current = torch.cuda.current_stream(self._device)
        # A stream that is being recorded must not wait for itself.
        if stream != current:
            stream.wait_stream(current)
        try:
            launched = self._context.execute_async_v3(stream.cuda_stream)
        finally:
            if stream != current:
                current.wait_stream(stream)
        messages.check()
        if not launched:
            raise messages.error(f"TensorRT failed on {self._network.name}")
        return outputs

    def _bind_input(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(self._device)
        if not can_bind(tensor):
            # `clone` would keep the layout of some views.
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        if not self._context.set_input_shape(name, tuple(tensor.shape)):
            raise self._messages.error(
                f"{self._network.name}: TensorRT rejects shape {tuple(tensor.shape)} of input {name}"
            )
        self._bind_address(name, tensor)
        return tensor

    def _bind_address(self, name: str, tensor: Tensor) -> None:
        address = tensor.data_ptr()
        if address % _ALIGNMENT:
            raise EngineError(
                f"{self._network.name}: {name} is at address {address:#x}, TensorRT requires an "
                f"alignment of {_ALIGNMENT} bytes"
            )
        if not self._context.set_tensor_address(name, address):
            raise self._messages.error(f"{self._network.name}: TensorRT rejects the address of {name}")

    def _infer_shapes(self) -> None:
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise self._messages.error(f"{self._network.name}: TensorRT cannot infer its shapes ({error})") from error
        if missing:
            raise EngineError(f"{self._network.name}: input {missing[0]} is missing")

    def _bind_scratch(self) -> Tensor:
        """Bind scratch memory of the size that the current shapes need, like trtexec and NVIDIA's samples.

        According to the documentation, `set_device_memory` requires the engine's `device_memory_size_v2`, which is the
        size for the largest shapes. That size is only passed if TensorRT rejects the smaller one.
        """
        messages = self._messages
        size = self._context.update_device_memory_size_for_shapes()
        # 0 means either that no memory is needed, or that the call failed.
        if size == 0 and messages.failed:
            raise messages.error(f"{self._network.name}: TensorRT cannot compute how much memory it needs")
        for enough in (size, max(size, self._engine.device_memory_size_v2)):
            messages.forget()
            scratch = torch.empty(enough, dtype=torch.uint8, device=self._device)
            self._context.set_device_memory(scratch.data_ptr() if enough else 0, enough)
            # This setter has no return value.
            if not messages.failed:
                return scratch
        raise messages.error(f"{self._network.name}: TensorRT rejects its scratch memory")

    def _bind_output(self, name: str) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(extent < 0 for extent in shape):
            raise EngineError(f"{self._network.name}: the shape of output {name} depends on data: {shape}")
        dtype = _DTYPES[self._engine.get_tensor_dtype(name).name]
        output = torch.empty(shape, dtype=dtype, device=self._device)
        self._bind_address(name, output)
        return output
