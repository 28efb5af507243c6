"""What identifies a stage's engine: its weights, its graph, its shapes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from frostline.models.precision import DTYPES
from frostline.runtime.backends import get_backend
from frostline.runtime.backends.options import OPSET, BuildOptions
from frostline.runtime.device import compute_capabilities
from frostline.runtime.memo import cache_folder, recall, remember
from frostline.runtime.stage import Network, Stage, TensorSpec
from frostline.runtime.store import EngineRecord, EngineStore, engine_key

# Raise it when a network's forward changes in a way that names, shapes and layers do not show.
GRAPH_VERSION = 1
# Raise it when the digest is made of other things.
_MEMO_VERSION = 2
_DEFAULT_OPTIONS = BuildOptions()


def weights_sha256(stage: Stage) -> str:
    """SHA-256 over the stage's networks, and names, dtypes, shapes and bytes of all their frozen tensors.

    The networks as well, because it is what frozen outputs are cached by: an operation's attributes are no tensors.
    Where the weights are away it is recalled by their files' sizes and times of change; if it was never computed, they
    are read for it.
    """
    weights = stage.weights
    if weights is None or weights.resident:
        return _sha256(stage)
    memo = digest_memo(stage, weights.source)
    known = recall(memo)
    if known is not None and re.fullmatch(r"[0-9a-f]{64}", known):
        return known
    weights.restore()
    computed = _sha256(stage)
    # Of what was read a moment ago, and not of tensors that someone may have changed since.
    remember(memo, computed)
    return computed


def digest_memo(stage: Stage, source: str) -> Path:
    """Where the digest of weights from `source` is noted."""
    graph = [_describe(network) for network in stage.networks]
    key = hashlib.sha256("\n".join([f"v{_MEMO_VERSION}", stage.name, source, *graph]).encode()).hexdigest()
    return cache_folder() / "weights" / f"{key}.sha256"


def _sha256(stage: Stage) -> str:
    digest = hashlib.sha256()
    for network in stage.networks:
        digest.update(f"{_describe(network)}\n".encode())
        for name, tensor in sorted(_frozen_tensors(network)):
            digest.update(f"{network.name}/{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stage_key(
    stage: Stage, backend: str, precision: str, weights: str, options: BuildOptions = _DEFAULT_OPTIONS
) -> str:
    """The content key of the engine of `stage` that `backend` builds with `options`."""
    furniture = get_backend(backend)
    return engine_key(
        weights_sha256=weights,
        graph=f"v{GRAPH_VERSION}\n" + "\n".join(_describe(network) for network in stage.networks),
        shapes={network.name: [_shapes(spec) for spec in network.inputs] for network in stage.networks},
        precision=precision,
        backend=backend,
        backend_version=furniture.version(),
        device=furniture.target(stage.networks[0].device, options),
        extra={"opset": options.opset} if furniture.SOURCE == "onnx" else {},
    )


def find_engine(store: EngineStore, stage: Stage, backend: str, weights: str) -> EngineRecord | None:
    """The engine in the store that computes `stage`, whatever it was built for; the one that serves best here.

    An engine's manifest says with which options it was built, and so which key it must have.
    """
    device, furniture, precision = stage.networks[0].device, get_backend(backend), precision_of(stage)
    candidates = []
    for record in store.find(stage.model, stage.name, backend):
        manifest = record.manifest
        if manifest is None or manifest.weights_sha256 != weights:
            continue
        options = BuildOptions(manifest.opset or OPSET, compute_capabilities(manifest.device))
        if manifest.key == stage_key(stage, backend, precision, weights, options):
            runs = furniture.obstacle(device, manifest.device) is None
            candidates.append(((runs, manifest.verified, manifest.created), record))
    return max(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


def precision_of(stage: Stage) -> str:
    """The floating-point type that the stage's weights have: fp32, fp16 or bf16."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names[stage.networks[0].weight.dtype]


def _frozen_tensors(network: Network) -> Iterator[tuple[str, Tensor]]:
    # By storage, because a live tensor goes by another name inside the module.
    live = {tensor.data_ptr() for tensor in network.live.values()}
    named = [*network.module.named_parameters(), *network.module.named_buffers()]
    yield from ((name, tensor) for name, tensor in named if tensor.data_ptr() not in live)


def _describe(network: Network) -> str:
    names = [spec.name for spec in network.inputs], list(network.live), network.outputs
    return f"{network.name} {names} {_architecture(network.module)}"


def _architecture(module: nn.Module) -> str:
    # The rank of live adapters is an open dimension of the graph, not part of its identity.
    lines = repr(module).splitlines()
    return "\n".join(line for line in lines if "lora_" not in line and "default" not in line)


def _shapes(spec: TensorSpec) -> list[object]:
    return [spec.name, str(spec.dtype), *(list(spec.shape_at(size)) for size in ("min", "opt", "max"))]
