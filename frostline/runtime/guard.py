"""Detect changes of a stage's modules since its engines were bound to them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from frostline.errors import EngineError
from frostline.runtime.backends.base.inputs import LiveCheck
from frostline.runtime.identity.architecture import adapter_parameters
from frostline.runtime.stage import ModuleTensors, Network, Stage

# Number of bytes from the middle of each tensor to compare: 16 values of fp32.
_PROBE_BYTES = 64


class WeightGuard:
    """A snapshot of a stage's module tree and frozen tensors; comparing it takes microseconds.

    It detects replaced modules and parameters, moved memory (`p.data = x`), and in-place changes that autograd counts.
    PEFT merges with `weight.data += delta`, which neither moves memory nor is counted. Therefore, some bytes of tensors
    on the CPU are compared as well. On a GPU, this would make the host wait: there one value of each tensor is
    compared, and only if a live tensor has changed too, as happens when an adapter is merged and reset.

    Not detected: a write through `.data` to part of a tensor, or on a GPU without a change of a live tensor.
    `Runtime.replan` hashes the weights again.

    Args:
        stage: its tensors are in memory, or released (`PartWeights`).
    """

    def __init__(self, stage: Stage) -> None:
        self._weights = stage.weights
        self._networks = stage.networks
        self.from_files = self._weights is not None and (not self._weights.resident or self._weights.as_read)
        self._edges = [edge for network in stage.networks for edge in _edges(network.module)]
        slots = [slot for network in stage.networks for slot in _frozen(network)]
        self._tensors = [(o, key, t, t.data_ptr(), _version(t)) for o, key, t in slots]
        tensors = [tensor for _, _, tensor in slots]
        self._probes = [(address, ctypes.string_at(address, size)) for address, size in map(_middle, tensors) if size]
        self._on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
        self._gpu_probe = _gather(self._on_gpu)
        self._live_versions = self._count_live()

    @property
    def sharded(self) -> bool:
        """Return whether weights were sharded over processes: FSDP then replaces the tensors of a layer at each use."""
        return any(hasattr(owner.get(key), "_local_tensor") for owner, key, *_ in self._tensors)

    def holds(self) -> bool:
        """Return whether nothing has changed since the snapshot."""
        if self._weights is not None and not self._weights.resident:
            return True  # released; compared after they are read again
        for owner, key, tensor, address, version in self._tensors:
            if owner.get(key) is not tensor or tensor.data_ptr() != address or _version(tensor) != version:
                return False
        if any(children.get(key) is not child for children, key, child in self._edges):
            return False
        read = ctypes.string_at
        for address, content in self._probes:
            if read(address, len(content)) != content:
                return False
        return self._gpu_probe is None or self._gpu_holds(self._gpu_probe)

    def restored(self) -> bool:
        """Return whether released weights have been read again from the files of the snapshot."""
        return self.from_files and self._weights is not None and self._weights.as_read

    def _count_live(self) -> int:
        tensors = (tensor for network in self._networks for tensor in network.live.values())
        return sum(_version(tensor) for tensor in tensors)

    def _gpu_holds(self, probe: Tensor) -> bool:
        versions = self._count_live()
        if versions == self._live_versions:
            return True
        self._live_versions = versions
        now = _gather(self._on_gpu)
        return now is not None and bool((now == probe).all())


class LiveGuard:
    """Check that engines support the live tensors of a stage and the adapter switches of its modules.

    Args:
        stage: its module tree must not change during the lifetime of the guard.
    """

    def __init__(self, stage: Stage) -> None:
        networks = [network for network in stage.networks if network.live]
        self._checks = [LiveCheck(network) for network in networks]
        self._module_state = stage.module_state()
        self._gone: str | None = None
        for network in networks:
            if isinstance(network.live, ModuleTensors):
                try:
                    network.live.look_up()
                except EngineError as error:
                    self._gone = str(error)

    def conflict(self) -> str | None:
        """Return why no engine matches the current state of the modules, or None."""
        if self._gone is not None:
            return self._gone
        if (reason := self._module_state()) is not None:
            return reason
        try:
            for check in self._checks:
                check()
        except EngineError as error:
            return str(error)
        return None


def _frozen(network: Network) -> Iterator[tuple[Mapping[str, Tensor | None], str, Tensor]]:
    """Yield the containing dict, the key and the tensor, for each tensor that an engine may have a copy of."""
    # If LoRA matrices are inputs, the matrices of other adapters do not change what engines compute.
    left_out = adapter_parameters(network.module) if network.live else set()
    left_out |= {id(tensor) for tensor in network.live.values()}
    for part in network.module.modules():
        for owner in (part._parameters, part._buffers):
            yield from ((owner, key, t) for key, t in owner.items() if t is not None and id(t) not in left_out)


def _edges(module: nn.Module) -> Iterator[tuple[dict[str, nn.Module | None], str, nn.Module]]:
    for part in module.modules():
        yield from ((part._modules, key, child) for key, child in part._modules.items() if child is not None)


def _version(tensor: Tensor) -> int:
    # Tensors created in inference mode have no version counter.
    return 0 if tensor.is_inference() else tensor._version


def _middle(tensor: Tensor) -> tuple[int, int]:
    """Return address and size of the bytes in the middle of a dense tensor on the CPU; size 0 for other tensors."""
    if tensor.device.type != "cpu":
        return 0, 0
    storage = tensor.untyped_storage()
    if tensor.data_ptr() + tensor.nbytes > storage.data_ptr() + storage.nbytes():
        return 0, 0  # expanded: several elements share one address
    size = min(_PROBE_BYTES, tensor.nbytes)
    return tensor.data_ptr() + (tensor.nbytes - size) // 2, size


def _gather(tensors: list[Tensor]) -> Tensor | None:
    """Return one value from the middle of each tensor that is not empty, (n,) float64; None if there are none."""
    values = [tensor.detach().reshape(-1)[tensor.numel() // 2].double() for tensor in tensors if tensor.numel()]
    return torch.stack(values) if values else None
