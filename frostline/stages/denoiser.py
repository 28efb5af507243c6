"""Denoiser stages of any family: noisy latents to velocity, with a live LoRA.

The adapter matrices and their scale are inputs of the graph; the matrices are bound to the trainer's own memory. After
an optimizer step the engine uses the updated LoRA without a rebuild; with scale 0, the same engine computes the KL
reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from frostline.models.lora.inject import (
    LoraSwitches,
    active_scale,
    adapters_off,
    live_scale,
    lora_parameters,
    lora_scale,
)
from frostline.runtime.stage import (
    Case,
    ModuleState,
    ModuleTensors,
    Network,
    Runner,
    Stage,
    Tensors,
    TensorSpec,
)

if TYPE_CHECKING:
    from frostline.models.lazy_weights import PartWeights
    from frostline.runtime.dynamic_dim import Dimension
    from frostline.runtime.engines.tolerance import Tolerance

# The variant without the LoRA: the reference of the KL term. The variant None is the policy, the model with its LoRA.
REFERENCE = "reference"

_LORA_SCALE = "lora_scale"
# Magnitude of the change of a layer's output by random adapters, relative to its input. It is several times the
# tolerance of engines, also in bf16, so that an engine without the LoRA fails the comparison.
_RANDOM_LORA = 0.5
_DESCRIPTION = (
    "Predict the flow-matching velocity (noise minus clip) from noisy latents. timestep: sigma times 1000. Inputs that "
    "begin with `lora.` are the matrices of a LoRA, A of (rank, in) and B of (out, rank). lora_scale: alpha / rank, or "
    "0 for the model without the LoRA."
)


class LiveLoraDenoiser(nn.Module):
    """Wrap a denoiser for tracing.

    The positional inputs are those in `inputs`, then `lora_scale` (0-dim; `alpha / rank`, or 0 for the KL reference),
    then the adapter matrices. Without an adapter, the last two are omitted.

    Args:
        denoiser: takes its inputs by name.
        network: the submodule that contains the LoRA.
    """

    def __init__(self, denoiser: nn.Module, network: nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.inputs = inputs
        self._path = next(name for name, module in denoiser.named_modules() if module is network)
        prefix = f"{self._path}." if self._path else ""
        self.adapter_names = [prefix + name for name in lora_parameters(network)]

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the velocity, (B, C, F, h, w)."""
        inputs = dict(zip(self.inputs, tensors, strict=False))
        if not self.adapter_names:
            return self.denoiser(**inputs)
        scale, *adapter = tensors[len(self.inputs) :]
        matrices = dict(zip(self.adapter_names, adapter, strict=True))
        with live_scale(self.denoiser.get_submodule(self._path), scale):
            return torch.func.functional_call(self.denoiser, matrices, (), inputs)


@dataclass(frozen=True, kw_only=True)
class DenoiserStage(Stage):
    """A denoiser with one network. If it has a LoRA, the variant `REFERENCE` is the model without it.

    The variant is known on the host: reading the scale from a tensor would make the host wait for a GPU.

    Attributes:
        lora_network: the submodule that contains the LoRA.
    """

    denoiser: nn.Module
    lora_network: nn.Module

    def torch(self, inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        """Return the velocity."""
        with adapters_off(self.lora_network) if variant == REFERENCE else nullcontext():
            return {"velocity": self.denoiser(**inputs)}

    def run(self, on: Mapping[str, Runner], inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        """Return the velocity; for the variant `REFERENCE`, the LoRA scale is 0."""
        (network,) = self.networks
        if network.live:
            scale = 0.0 if variant == REFERENCE else active_scale(self.lora_network)
            inputs = {**inputs, _LORA_SCALE: torch.full((), scale, device=network.device)}
        return on[network.name](**inputs)

    def cases(self) -> Mapping[str, Case]:
        """Return random inputs; with a LoRA, one case for each variant."""
        (network,) = self.networks
        inputs = {name: tensor for name, tensor in network.samples("opt").items() if name != _LORA_SCALE}
        return {"sample": Case(inputs), **({"base": Case(inputs, REFERENCE)} if network.live else {})}

    def module_state(self) -> ModuleState:
        """Return a check of the LoRA layers' state."""
        return LoraSwitches(self.lora_network).conflict


def denoiser_stage(
    name: str,
    denoiser: nn.Module,
    lora_network: nn.Module,
    inputs: tuple[TensorSpec, ...],
    rank: Dimension,
    *,
    model: str,
    tolerance: Tolerance,
    license: str | None = None,
    weights: PartWeights | None = None,
) -> DenoiserStage:
    """Create the stage of a denoiser.

    Args:
        denoiser: takes `inputs` by name; the first two are `latents` and `timestep`.
        lora_network: the submodule that contains the LoRA, if any.
        rank: the range of LoRA ranks that engines support.
        model, tolerance, license, weights: see `Stage`.
    """
    adapter = lora_parameters(lora_network)
    scale = lora_scale(lora_network) if adapter else 0.0
    specs = tuple(_adapter_spec(parameter, matrix, rank, scale) for parameter, matrix in adapter.items())
    paths = dict(zip((spec.name for spec in specs), adapter, strict=True))
    network = Network(
        name,
        LiveLoraDenoiser(denoiser, lora_network, tuple(spec.name for spec in inputs)).eval(),
        (*inputs, *([_scale_spec(scale)] if adapter else [])),
        ("velocity",),
        live=ModuleTensors(lora_network, paths),
        live_specs=specs,
    )
    return DenoiserStage(
        name=name,
        model=model,
        description=_DESCRIPTION,
        license=license,
        networks=(network,),
        tolerance=tolerance,
        weights=weights,
        denoiser=denoiser,
        lora_network=lora_network,
    )


def random_timesteps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return random timesteps, uniform in [0, 1000]."""
    return 1000 * torch.rand(shape, generator=generator)


def _scale_spec(scale: float) -> TensorSpec:
    return TensorSpec(_LORA_SCALE, (), fill=lambda shape, generator: torch.full(shape, scale))


def _adapter_spec(parameter_name: str, matrix: Tensor, rank: Dimension, scale: float) -> TensorSpec:
    """Return the graph input of one adapter matrix: A is (rank, in), B is (out, rank)."""
    name = "lora." + parameter_name.replace(".default.weight", "")
    first = ".lora_A." in parameter_name
    shape = (rank, matrix.shape[1]) if first else (matrix.shape[0], rank)
    gain = 1.0 if first else _RANDOM_LORA / scale

    def fill(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        # Each matrix sums over its second dimension, so that scale · B A x has `_RANDOM_LORA` times the magnitude of x
        # at any rank and scale.
        return gain / math.sqrt(shape[1]) * torch.randn(shape, generator=generator)

    return TensorSpec(name, shape, matrix.dtype, fill)
