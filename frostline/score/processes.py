"""Divide a run over the processes that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from frostline.runtime.device import resolve_device

T = TypeVar("T")

# Timeout of the barrier: a finished process waits for the slowest one, which can take hours.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process and the number of processes.

    Attributes:
        rank: the rank of this process.
        count: the number of processes.
        device: the device of this process; with several GPUs, each process uses a different one.
    """

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> Processes:
        """Join the process group, if a launcher started several processes.

        Args:
            device: `cpu`, `cuda`, … or `auto`.
        Raises:
            ConfigError: the device is not available.
        """
        asked = resolve_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, asked)
        from accelerate import PartialState

        state = PartialState(cpu=asked.type == "cpu", timeout=_PATIENCE)
        own = state.device if asked == torch.device("cuda") else asked
        assert own is not None
        return cls(state.process_index, state.num_processes, own)

    @property
    def is_main(self) -> bool:
        """Return whether this process merges the results, prints them and writes the report."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items of this process: every `count`-th one, starting at `rank`."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()
