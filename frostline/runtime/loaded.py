"""The engines that are in memory, each loaded when it is first used."""

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

    networks: runners of its networks, by name. run: computes the whole stage; takes inputs and variant.
    """

    networks: Mapping[str, Runner]
    run: Callable[[Tensors, str | None], dict[str, Tensor]]


class LoadedEngines:
    """Stages on backends. Not for several threads at once.

    Args:
        stages: by name.
        store: None where there are no engines.
        find: the engine of a stage on a backend.
    """

    def __init__(self, stages: Mapping[str, Stage], store: EngineStore | None, find: FindRecord) -> None:
        self._stages = stages
        self._store = store
        self._find = find
        self._loaded: dict[tuple[str, str], LoadedStage] = {}

    def __contains__(self, stage_and_backend: tuple[str, str]) -> bool:
        return stage_and_backend in self._loaded

    def load(self, name: str, backend: str) -> LoadedStage:
        """Return a stage on a backend, torch among them.

        Raises:
            EngineError: there is no engine, or it is refused or does not load.
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
            EngineError: there is none, or it is refused.
        """
        record = self._find(name, backend)
        if self._store is None or record is None:
            raise EngineError(f"no engine: build it with `{export_command(name, backend)}`")
        return self._store.verify(record)

    def unload(self, name: str, keep: Collection[str] = ()) -> None:
        """Give back the memory of a stage's engines, but of those on the backends `keep`."""
        for key in [key for key in self._loaded if key[0] == name and key[1] not in keep]:
            del self._loaded[key]

    def unload_borrowers(self, name: str) -> None:
        """Give back those that compute with the module's own weights: these are elsewhere now."""
        self.unload(name, keep=[backend for _, backend in self._loaded if holds_weights(backend)])

    def _load(self, stage: Stage, backend: str) -> Mapping[str, Runner]:
        engine = self.verify(stage.name, backend)
        if not engine.manifest.verified:
            raise EngineError(
                f"engine {engine.path} was built but never compared with PyTorch: "
                "`frostline plan MODEL` does so on this machine"
            )
        if not engine.manifest.keeps(stage.tolerance):
            again = export_command(stage.name, backend)
            log.warning("stage %s: its %s engine was verified within looser bounds: `%s`", stage.name, backend, again)
        networks = {network.name: network for network in stage.networks}
        return get_backend(backend).load(engine, networks, stage.networks[0].device)


def holds_weights(backend: str) -> bool:
    """Return whether an engine of this backend has weights of its own."""
    return backend != TORCH and get_backend(backend).holds_weights


def weight_bytes(stage: Stage) -> int:
    """Size of a stage's weights, each counted once."""
    if stage.weights is not None:
        return stage.weights.nbytes
    parameters = (p for network in stage.networks for p in network.module.parameters())
    return sum({id(parameter): parameter.nbytes for parameter in parameters}.values())
