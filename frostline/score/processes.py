"""The processes of one run: `accelerate launch` or `torchrun` starts several, otherwise there is one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from frostline.runtime.device import resolve_device

T = TypeVar("T")

# A process that is done waits for the slowest, which may have an hour of video left.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process among all. device: `auto` resolved, each process with a GPU of its own where there are any."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> Processes:
        """Find the others, if a launcher started several.

        Args:
            device: `cpu`, `cuda`, … or `auto`.
        Raises:
            ConfigError: there is no such device here.
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
        """Whether this is the process that merges, prints and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: one in `count`, so that all have long and short ones."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()
