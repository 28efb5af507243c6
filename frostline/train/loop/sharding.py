"""FSDP2: shard the frozen weights of the denoisers over the processes; each process keeps the whole LoRA.

The LoRA is small, and engines are bound to its memory; sharded, it would have to be gathered before each use. Every
process therefore keeps all of it, and gradients are averaged explicitly (`Training.replicated`). The sharded weights
have no gradient: they are gathered layer by layer and never scattered.
"""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from frostline.errors import ConfigError
from frostline.models.quantization.linear import quantised_layers
from frostline.train.step.module import TrainingModule


def shard_frozen_weights(module: TrainingModule, accelerator: Accelerator) -> bool:
    """Shard the frozen weights if accelerate is configured for FSDP2; return whether they are sharded.

    Call this before `accelerator.prepare`.

    Raises:
        ConfigError: accelerate is configured for FSDP1 or DeepSpeed, or for FSDP2 with weights that are quantised or
            offloaded, which are not supported.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # It also keeps its own, sharded copy of the optimizer, which a checkpoint cannot store bit for bit.
        raise ConfigError(
            "DeepSpeed is not supported: it updates the weights during backward, before a "
            "non-finite gradient can be skipped; use FSDP2 (accelerate launch --use_fsdp "
            "--fsdp_version 2)"
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise ConfigError("FSDP1 is not supported; use FSDP2 (accelerate launch --fsdp_version 2)")
    if any(expert.module.offload is not None for expert in module.model.experts):
        raise ConfigError("offload.blocks: offloaded weights cannot be sharded: remove the setting, or do not use FSDP")
    if any(quantised_layers(expert.network) for expert in module.model.experts):
        raise ConfigError("quantization: weights in 8 or 4 bits cannot be sharded: remove the setting, or use DDP")
    from torch.distributed.fsdp import fully_shard

    for expert in module.model.experts:
        if not expert.trained and expert.stage not in module.runtime.idle:
            # Its outputs are cached by the hash of its weights, which is computed before they are sharded.
            module.runtime.fingerprint(expert.stage)
    for layer in _frozen_layers(module):
        fully_shard(layer)
    plugin = accelerator.state.fsdp_plugin
    assert plugin is not None
    plugin.cpu_ram_efficient_loading = False
    plugin.auto_wrap_policy = None
    # accelerate shards all remaining parameters that are not ignored: none, because all of them are ignored.
    sharded = {id(parameter) for layer in _frozen_layers(module) for parameter in layer.parameters()}
    plugin.ignored_modules = [nn.ParameterList(p for p in module.parameters() if id(p) not in sharded)]
    return True


def sample_through_shards(module: TrainingModule) -> None:
    """Register `generate_latents` with FSDP2, so that it gathers weights like `forward`.

    Call this after `accelerator.prepare`.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    # `generate` calls it; the decoder is never sharded.
    register_fsdp_forward_method(module, "generate_latents")


def _frozen_layers(module: TrainingModule) -> list[nn.Linear]:
    """Return the linear layers of the denoisers' blocks, which contain nearly all of a model's weights."""
    return [
        layer
        for expert in module.model.experts
        if expert.stage not in module.runtime.idle  # its weights are not in memory
        for block in expert.module.blocks
        for layer in block.modules()
        if isinstance(layer, nn.Linear) and not any(parameter.requires_grad for parameter in layer.parameters())
    ]
