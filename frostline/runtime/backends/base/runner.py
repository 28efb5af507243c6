"""The part that the runners of all backends share: input checks, locking, and classification of failures."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar

from torch import Tensor

from frostline.errors import EngineError
from frostline.runtime.stage import Network

from .inputs import LiveCheck, check_inputs
from .memory import engine_failure


class EngineRunner(ABC):
    """Run one network; thread-safe. A subclass loads the engine and implements `_run`.

    Args:
        network: names of inputs and outputs, the range of shapes, and the live tensors, which are read at each call.
    Raises:
        EngineError: the engine does not support the live tensors.
    """

    # Name of the library in messages.
    library_name: ClassVar[str]
    # Substrings of its messages that mean out of memory, for errors whose type does not show it.
    out_of_memory: ClassVar[tuple[str, ...]] = ()
    # Whether calls from several threads have to wait for each other.
    one_call_at_a_time: ClassVar[bool] = True

    def __init__(self, network: Network) -> None:
        self._network = network
        self._check_live = LiveCheck(network)
        self._check_live()
        self._turn: AbstractContextManager[object] = threading.Lock() if self.one_call_at_a_time else nullcontext()

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the network. Outputs are newly allocated and ready on torch's current stream.

        Raises:
            InputError: an input is invalid; a ShapeError if its shape is.
            EngineError: the library failed, or the engine does not support the live tensors; an EngineMemoryError if
                memory ran out.
        """
        check_inputs(self._network, inputs)
        self._check_live()
        with self._turn, self._failures("failed on"):
            return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name, for checked inputs in any memory layout."""

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        """Convert errors of the library within the block to EngineErrors.

        Args:
            what: what the library did, such as `failed on`.
        """
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            raise engine_failure(
                f"{self.library_name} {what} {self._network.name}", error, self.out_of_memory
            ) from error
