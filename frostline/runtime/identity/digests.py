"""Digests of the stages' weights, taken again where the modules have changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

from frostline.runtime.guard import WeightGuard
from frostline.runtime.identity.fingerprint import weights_sha256
from frostline.runtime.stage import Stage

log = logging.getLogger(__name__)

Change = Literal["none", "moved", "changed"]


class WeightDigests:
    """What `weights_sha256` says of each stage, as its modules are now. Not for several threads at once.

    Args:
        stages: by name.
    """

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self._stages = stages
        self._digests: dict[str, str] = {}
        self._guards: dict[str, WeightGuard] = {}
        # Their weights were spread over processes: what swaps their tensors from then on is FSDP.
        self._sharded: set[str] = set()

    def __getitem__(self, name: str) -> str:
        """The digest, as of the last `update`."""
        return self._digests[name]

    def sharded(self, name: str) -> bool:
        """Whether the weights of a stage were seen to be spread over several processes."""
        guard = self._guards.get(name)
        return name in self._sharded or (guard is not None and guard.sharded)

    def update(self, name: str) -> Change:
        """Bring a digest up to date, and return what became of the weights since: `moved` where values are equal."""
        guard = self._guards.get(name)
        if guard is None:
            self._hash(name)
            return "none"
        if name in self._sharded or guard.holds():
            return "none"
        if guard.sharded:
            self._sharded.add(name)
            return "none"
        before = self._digests[name]
        if guard.restored():
            self._guards[name] = WeightGuard(self._stages[name])
        else:
            log.info("stage %s: its weights were written to or moved, hashing them again", name)
            self._hash(name)
        return "moved" if self._digests[name] == before else "changed"

    def forget(self) -> None:
        """Take all of them anew, but of weights that are no longer whole."""
        for name in self._digests.keys() - self._sharded:
            del self._digests[name], self._guards[name]

    def copied(self, stages: Mapping[str, Stage]) -> WeightDigests:
        """The same for copies of the stages."""
        copied = WeightDigests(stages)
        for name, guard in self._guards.items():
            if name not in self._sharded and guard.holds():
                copied._digests[name] = self._digests[name]
                copied._guards[name] = WeightGuard(stages[name])
        return copied

    def _hash(self, name: str) -> None:
        # The snapshot first: what changes while the hash is taken is then noticed.
        self._guards[name] = WeightGuard(self._stages[name])
        self._digests[name] = weights_sha256(self._stages[name])
