"""Digests of the stages' weights, computed again when the modules have changed."""

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
    """The `weights_sha256` of each stage for the current state of its modules. Not thread-safe.

    Args:
        stages: by name.
    """

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self._stages = stages
        self._digests: dict[str, str] = {}
        self._guards: dict[str, WeightGuard] = {}
        # Stages with sharded weights: FSDP replaces their tensors at each use.
        self._sharded: set[str] = set()

    def __getitem__(self, name: str) -> str:
        """Return the digest of the last `update`."""
        return self._digests[name]

    def sharded(self, name: str) -> bool:
        """Return whether the weights of a stage are known to be sharded over several processes."""
        guard = self._guards.get(name)
        return name in self._sharded or (guard is not None and guard.sharded)

    def update(self, name: str) -> Change:
        """Update a digest and return how the weights changed since the last call: `moved` if their values are equal."""
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
            log.info("stage %s: its weights were changed or moved and are hashed again", name)
            self._hash(name)
        return "moved" if self._digests[name] == before else "changed"

    def forget(self) -> None:
        """Discard all digests except those of sharded weights; `update` computes them again."""
        for name in self._digests.keys() - self._sharded:
            del self._digests[name], self._guards[name]

    def copied(self, stages: Mapping[str, Stage]) -> WeightDigests:
        """Return digests for copies of the stages."""
        copied = WeightDigests(stages)
        for name, guard in self._guards.items():
            if name not in self._sharded and guard.holds():
                copied._digests[name] = self._digests[name]
                copied._guards[name] = WeightGuard(stages[name])
        return copied

    def _hash(self, name: str) -> None:
        # Take the snapshot first: it then detects changes during hashing.
        self._guards[name] = WeightGuard(self._stages[name])
        self._digests[name] = weights_sha256(self._stages[name])
