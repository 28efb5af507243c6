"""What the runners of all backends do alike: check, take turns, tell whose fault a failure is."""

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
    """Runs one network; safe to call from several threads. A subclass loads the engine, and computes in `_run`.

    Args:
        network: names of inputs and outputs, the range of shapes, and the live tensors, which are read at each call.
    Raises:
        EngineError: the engine does not take the live tensors.
    """

    # The library, as messages call it.
    library_name: ClassVar[str]
    # What its messages contain, word for word, where memory ran out and nothing else says so.
    out_of_memory: ClassVar[tuple[str, ...]] = ()
    # Whether a call has to wait for those of other threads.
    one_call_at_a_time: ClassVar[bool] = True

    def __init__(self, network: Network) -> None:
        self._network = network
        self._check_live = LiveCheck(network)
        self._check_live()
        self._turn: AbstractContextManager[object] = threading.Lock() if self.one_call_at_a_time else nullcontext()

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the network; outputs are freshly allocated, and ready on torch's current stream.

        Raises:
            InputError: an input is not what the engine takes; a ShapeError where it is the shape.
            EngineError: the library failed, or the engine does not take the live tensors; an EngineMemoryError where
                memory ran out.
        """
        check_inputs(self._network, inputs)
        self._check_live()
        with self._turn, self._failures("failed on"):
            return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs by name, of checked inputs in any memory layout."""

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        """Raise as an EngineError whatever the library raises within the block.

        Args:
            what: the library did, such as `failed on`.
        """
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            raise engine_failure(
                f"{self.library_name} {what} {self._network.name}", error, self.out_of_memory
            ) from error
