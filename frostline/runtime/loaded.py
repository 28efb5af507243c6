"""The engines in memory, each loaded at first use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from frostline.errors import EngineError
from frostline.runtime.backends import TORCH, get_backend
from frostline.runtime.engines.store import EngineRecord, EngineStore
from frostline.runtime.engines.verification import VerifiedEngine
from frostline.runtime.hints import export_command
from frostline.runtime.stage import Runner, Stage, Tensors, in_torch

log = logging.getLogger(__name__)

FindRecord = Callable[[str, str], EngineRecord | None]


@dataclass(frozen=True)
class LoadedStage:
    """A stage on one backend.

    Attributes:
        networks: runners of its networks, by name.
        run: computes the whole stage; its arguments are inputs and variant.
    """

    networks: Mapping[str, Runner]
    run: Callable[[Tensors, str | None], dict[str, Tensor]]


class LoadedEngines:
    """The loaded engines of all stages. Not thread-safe.

    Args:
        stages: by name.
        store: None if there are no engines.
        find: returns the engine of a stage on a backend.
    """

    def __init__(self, stages: Mapping[str, Stage], store: EngineStore | None, find: FindRecord) -> None:
        self._stages = stages
        self._store = store
        self._find = find
        self._loaded: dict[tuple[str, str], LoadedStage] = {}

    def __contains__(self, stage_and_backend: tuple[str, str]) -> bool:
        return stage_and_backend in self._loaded

    def load(self, name: str, backend: str) -> LoadedStage:
        """Return a stage on a backend, or on torch.

        Raises:
            EngineError: there is no engine, or it is rejected or cannot be loaded.
        """
        stage = self._stages[name]
        if not holds_weights(backend):
            stage.restore_weights()
        if backend == TORCH:
            return LoadedStage({network.name: in_torch(network) for network in stage.networks}, stage.torch)
        if (name, backend) not in self._loaded:
            networks = self._load(stage, backend)
            self._loaded[name, backend] = LoadedStage(networks, partial(stage.run, networks))
        return self._loaded[name, backend]

    def verify(self, name: str, backend: str) -> VerifiedEngine:
        """Return the engine of a stage after checking its signature and hashes.

        Raises:
            EngineError: there is none, or it is rejected.
        """
        record = self._find(name, backend)
        if self._store is None or record is None:
            raise EngineError(f"no engine: build it with `{export_command(name, backend)}`")
        return self._store.verify(record)

    def unload(self, name: str, keep: Collection[str] = ()) -> None:
        """Release the engines of a stage, except those on the backends `keep`."""
        for key in [key for key in self._loaded if key[0] == name and key[1] not in keep]:
            del self._loaded[key]

    def unload_borrowers(self, name: str) -> None:
        """Release the engines that use the module's own weights, which have been moved."""
        self.unload(name, keep=[backend for _, backend in self._loaded if holds_weights(backend)])

    def _load(self, stage: Stage, backend: str) -> Mapping[str, Runner]:
        engine = self.verify(stage.name, backend)
        if not engine.manifest.verified:
            raise EngineError(
                f"engine {engine.path} was never compared with PyTorch: run `frostline plan MODEL` on this machine"
            )
        if not engine.manifest.keeps(stage.tolerance):
            again = export_command(stage.name, backend)
            log.warning(
                "stage %s: its %s engine was verified with looser tolerances: compare it again with `%s`",
                stage.name,
                backend,
                again,
            )
        networks = {network.name: network for network in stage.networks}
        return get_backend(backend).load(engine, networks, stage.networks[0].device)


def holds_weights(backend: str) -> bool:
    """Return whether engines of this backend contain their own weights."""
    return backend != TORCH and get_backend(backend).holds_weights


def weight_bytes(stage: Stage) -> int:
    """Return the size of a stage's weights in bytes; shared weights are counted once."""
    if stage.weights is not None:
        return stage.weights.nbytes
    parameters = (p for network in stage.networks for p in network.module.parameters())
    return sum({id(parameter): parameter.nbytes for parameter in parameters}.values())
