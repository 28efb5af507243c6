"""The identity of a stage's engine: a hash of its weights, code, graph and shapes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType

from torch import Tensor, nn

from frostline.models.lazy_weights import PartWeights
from frostline.models.precision import precision_name
from frostline.runtime.backends import get_backend, module_name
from frostline.runtime.backends.base.options import OPSET, BuildOptions
from frostline.runtime.device import compute_capabilities
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.store import EngineRecord, EngineStore, engine_key
from frostline.runtime.identity.architecture import adapter_parameters, describe
from frostline.runtime.identity.computation import computation_id
from frostline.runtime.identity.tensor_bytes import tensor_bytes
from frostline.runtime.stage import Network, Stage, TensorSpec
from frostline.runtime.user_cache import cache_folder, recall, remember

# The modules that trace a network for an engine. They are in a layer above the runtime, which must not import them.
_TRACERS = {
    "onnx": ("frostline.export.tracing.onnx", "onnxscript"),
    "exported_program": ("frostline.export.tracing.torch_export",),
}
_DEFAULT_OPTIONS = BuildOptions()


def weights_sha256(stage: Stage) -> str:
    """Return the SHA-256 over the stage's networks and the names, dtypes, shapes and bytes of their frozen tensors.

    The networks are included because frozen outputs are cached under this digest, and attributes of operations are not
    tensors. For released weights, the digest is looked up by the size and modification time of their files; if it is
    not found, the weights are read.
    """
    weights = stage.weights
    if weights is None or weights.resident:
        return _sha256(stage)
    memo = digest_memo(stage, weights)
    known = recall(memo)
    if known is not None and re.fullmatch(r"[0-9a-f]{64}", known):
        return known
    weights.restore()
    computed = _sha256(stage)
    # Stored only for weights that were just read: weights in memory may have been changed.
    remember(memo, computed)
    return computed


def digest_memo(stage: Stage, weights: PartWeights) -> Path:
    """Return the path of the cache file for the digest of weights that can be released."""
    graph = [_describe(network) for network in stage.networks]
    code = computation_id([__name__, describe.__module__, *weights.readers])
    key = hashlib.sha256("\n".join([code, stage.name, weights.source, *graph]).encode()).hexdigest()
    return cache_folder() / "weights" / f"{key}.sha256"


def _sha256(stage: Stage) -> str:
    digest = hashlib.sha256()
    for network in stage.networks:
        digest.update(f"{_describe(network)}\n".encode())
        for name, tensor in sorted(_frozen_tensors(network), key=lambda named: named[0]):
            digest.update(f"{network.name}/{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def stage_code(stage: Stage) -> set[str]:
    """Return the names of the modules whose code computes the stage: its networks' modules and the stage's own."""
    values = (stage, *vars(stage).values(), *(network.module for network in stage.networks))
    # The common base classes only pass tensors on.
    return {name for value in values for name in _modules_of(value)} - {Stage.__module__}


def stage_computation(stage: Stage) -> str:
    """Return the `computation_id` of the stage in PyTorch."""
    return computation_id(stage_code(stage))


def stage_key(
    stage: Stage, backend: str, precision: str, weights: str, options: BuildOptions = _DEFAULT_OPTIONS
) -> str:
    """Return the content key of the engine of `stage` that `backend` builds with `options`.

    Args:
        precision: see `precision_of`.
        weights: see `weights_sha256`.
    """
    return _EngineKeys(stage, backend, precision, weights).key(options)


def find_engine(store: EngineStore, stage: Stage, backend: str, weights: str) -> EngineRecord | None:
    """Return the engine in the store that computes `stage` and suits this machine best, for any build options, or None.

    `weights` is the digest of `weights_sha256`. An engine's manifest contains its build options, and thereby determines
    its expected key.
    """
    device, served_by = stage.networks[0].device, get_backend(backend)
    keys, candidates = None, []
    for record in store.find(stage.model, stage.name, backend):
        manifest = record.manifest
        if manifest is None or manifest.weights_sha256 != weights:
            continue
        keys = keys or _EngineKeys(stage, backend, precision_of(stage), weights)
        options = BuildOptions(manifest.opset or OPSET, compute_capabilities(manifest.device))
        if manifest.key == keys.key(options):
            runs = served_by.obstacle(device, manifest.device) is None
            candidates.append(((runs, manifest.verified, manifest.created), record))
    return max(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


def precision_of(stage: Stage) -> str:
    """Return the floating-point type of the stage's weights: fp32, fp16 or bf16.

    Raises:
        ConfigError: the weights have another type.
    """
    return precision_name(stage.networks[0].weight.dtype)


class _EngineKeys:
    """The keys of a stage's engines on one backend, by their build options."""

    def __init__(self, stage: Stage, backend: str, precision: str, weights: str) -> None:
        self._backend = get_backend(backend)
        self._device = stage.networks[0].device
        built_by = (*_TRACERS[self._backend.source], module_name(backend))
        specs = {network.name: (*network.inputs, *network.live_specs) for network in stage.networks}
        self._key = partial(
            engine_key,
            weights_sha256=weights,
            computation=computation_id([*stage_code(stage), *built_by]),
            graph="\n".join(_describe(network) for network in stage.networks),
            shapes={name: [_shape(spec) for spec in of_network] for name, of_network in specs.items()},
            precision=precision,
            backend=backend,
            backend_version=self._backend.version(),
        )

    def key(self, options: BuildOptions) -> str:
        """Return the key of an engine that is built with `options`."""
        target = self._backend.target(self._device, options)
        return self._key(device=target, extra={"opset": options.opset} if self._backend.source == "onnx" else {})


def _frozen_tensors(network: Network) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors that an engine may copy: all except the live ones."""
    # Compared by storage, because a live tensor may have another name inside the module; and by layer, because the
    # tensors that the stage was created with may have been replaced.
    storages = {tensor.data_ptr() for tensor in network.live.values()} - {0}
    adapters = adapter_parameters(network.module) if network.live else set()
    for name, tensor in (*network.module.named_parameters(), *network.module.named_buffers()):
        if id(tensor) not in adapters and tensor.data_ptr() not in storages:
            yield name, tensor


def _describe(network: Network) -> str:
    names = [spec.name for spec in network.inputs], list(network.live), network.outputs
    return f"{network.name} {names} {describe(network.module, live_lora=bool(network.live))}"


def _shape(spec: TensorSpec) -> list[object]:
    """Return the name, dtype and shape of a spec, without its sample values; dimensions of the same name are shared."""
    extents = (list(vars(e).values()) if isinstance(e, Dimension) else e for e in spec.shape)
    return [spec.name, str(spec.dtype), *extents]


def _modules_of(value: object) -> set[str]:
    """Return the Python modules that define an object; for a network, also those of its submodules and attributes."""
    if not isinstance(value, nn.Module):
        return _modules_of_one(value)
    attributes = (attribute for part in value.modules() for attribute in vars(part).values())
    functions = [attribute for attribute in attributes if isinstance(attribute, FunctionType | MethodType)]
    kinds = {type(part): part for part in value.modules()}
    return {name for part in (*kinds.values(), *functions) for name in _modules_of_one(part)}


def _modules_of_one(value: object) -> set[str]:
    if isinstance(value, FunctionType | MethodType):
        return {value.__module__}
    return {kind.__module__ for kind in type(value).__mro__}
