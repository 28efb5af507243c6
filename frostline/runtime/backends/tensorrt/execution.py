"""One execution context of an engine: what it binds, the memory that it works in, and how it is launched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from frostline.errors import EngineError
from frostline.runtime.stage import Network

from .messages import Messages

# What TensorRT demands of every address.
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
    """Return whether TensorRT can use a tensor where it is: dense, and at an address that is aligned."""
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0


class Execution:
    """Enqueues the network, in memory that torch allocates at each launch.

    Not for several threads at once, nor for a second launch on another stream before the first is over.

    Args:
        context: TensorRT's execution context, its memory managed by the user.
        engine: the context's engine.
    """

    def __init__(self, context: Any, engine: Any, network: Network, device: torch.device, messages: Messages) -> None:
        self._context = context
        self._engine = engine
        self._network = network
        self._device = device
        self._messages = messages

    def __call__(self, inputs: Mapping[str, Tensor], stream: torch.cuda.Stream) -> dict[str, Tensor]:
        """Enqueue one launch on `stream`, which has to wait for torch's current stream, and that for it afterwards.

        Returns:
            Outputs that were allocated on torch's current stream.
        Raises:
            EngineError: TensorRT refuses it; an EngineMemoryError where memory was the reason.
        """
        messages = self._messages
        messages.forget()
        # Whatever is copied must live until the launch; afterwards the streams' order protects it.
        kept = [self._bind_input(name, tensor) for name, tensor in {**inputs, **self._network.live}.items()]
        self._infer_shapes()
        kept.append(self._bind_scratch())
        outputs = {name: self._bind_output(name) for name in self._network.outputs}
        current = torch.cuda.current_stream(self._device)
        # To wait for itself is a mistake while a stream is recorded.
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
            # A clone would keep the layout of some views.
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        if not self._context.set_input_shape(name, tuple(tensor.shape)):
            raise self._messages.error(f"{self._network.name}: input {name} of shape {tuple(tensor.shape)} is refused")
        self._bind_address(name, tensor)
        return tensor

    def _bind_address(self, name: str, tensor: Tensor) -> None:
        address = tensor.data_ptr()
        if address % _ALIGNMENT:
            raise EngineError(
                f"{self._network.name}: {name} lies at {address:#x}, TensorRT wants addresses aligned to {_ALIGNMENT}"
            )
        if not self._context.set_tensor_address(name, address):
            raise self._messages.error(f"{self._network.name}: the address of {name} is refused")

    def _infer_shapes(self) -> None:
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise self._messages.error(f"{self._network.name}: TensorRT cannot infer its shapes ({error})") from error
        if missing:
            raise EngineError(f"{self._network.name} lacks its input {missing[0]}")

    def _bind_scratch(self) -> Tensor:
        """Scratch memory of the size that the shapes need, as trtexec and NVIDIA's samples give it.

        `set_device_memory` is documented to want the engine's `device_memory_size_v2`, which is what the largest shapes
        need: it gets that much where it does not take less.
        """
        messages = self._messages
        size = self._context.update_device_memory_size_for_shapes()
        # 0 may mean both: that no memory is needed, or that the question failed.
        if size == 0 and messages.failed:
            raise messages.error(f"{self._network.name}: TensorRT cannot say how much memory it needs")
        for enough in (size, max(size, self._engine.device_memory_size_v2)):
            messages.forget()
            scratch = torch.empty(enough, dtype=torch.uint8, device=self._device)
            self._context.set_device_memory(scratch.data_ptr() if enough else 0, enough)
            # Which returns nothing.
            if not messages.failed:
                return scratch
        raise messages.error(f"{self._network.name}: TensorRT refuses its scratch memory")

    def _bind_output(self, name: str) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(extent < 0 for extent in shape):
            raise EngineError(f"{self._network.name}: the shape of output {name} depends on data: {shape}")
        dtype = _DTYPES[self._engine.get_tensor_dtype(name).name]
        output = torch.empty(shape, dtype=dtype, device=self._device)
        self._bind_address(name, output)
        return output
