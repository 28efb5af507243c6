"""What identifies a stage's engine: its weights, its graph, its shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from frostline.runtime.backends import get_backend
from frostline.runtime.stage import Network, Stage, TensorSpec
from frostline.runtime.store import engine_key

# Raise it when a network's forward changes in a way that names, shapes and layers do not show.
GRAPH_VERSION = 1


def weights_sha256(stage: Stage) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all frozen tensors of the stage."""
    digest = hashlib.sha256()
    for network in stage.networks:
        for name, tensor in sorted(_frozen_tensors(network)):
            digest.update(f"{network.name}/{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stage_key(stage: Stage, backend: str, precision: str, weights: str) -> str:
    """The content key of the engine of `stage` on `backend` for the device its weights are on."""
    return engine_key(
        weights_sha256=weights,
        graph=f"v{GRAPH_VERSION}\n" + "\n".join(_describe(network) for network in stage.networks),
        shapes={network.name: [_shapes(spec) for spec in network.inputs] for network in stage.networks},
        precision=precision,
        backend=backend,
        backend_version=get_backend(backend).version(),
        device=device_name(stage.networks[0].device),
    )


def device_name(device: torch.device) -> str:
    """`cpu`, or the compute capability such as `sm_90`."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def precision_of(stage: Stage) -> str:
    """The floating-point type that the stage's weights have: fp32, fp16 or bf16."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
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
