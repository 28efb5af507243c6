"""Select the adapters to merge into each of Wan's denoisers when its weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from frostline.errors import ConfigError
from frostline.models.lora.base_adapters import MergedRead

if TYPE_CHECKING:
    from frostline.config import BaseAdapter
    from frostline.models.wan.model_spec import ModelSpec

_NETWORKS = {"low": "denoiser", "high": "denoiser_high_noise"}


def merged_reads(spec: ModelSpec, adapters: Sequence[BaseAdapter]) -> dict[str, MergedRead]:
    """Return the reader of each denoiser that has adapters, by the name of the network.

    Raises:
        ConfigError: the model has two experts, and an adapter names no expert; or it has one denoiser, and an adapter
            names an expert. The message names the path.
    """
    of_network: dict[str, list[BaseAdapter]] = {}
    for number, adapter in enumerate(adapters):
        where = f"base_adapters.{number}.expert"
        if spec.two_experts and adapter.expert is None:
            raise ConfigError(f"{where}: {spec.name} has two experts: set the expert of {adapter.path} to low or high")
        if not spec.two_experts and adapter.expert is not None:
            raise ConfigError(
                f"{where}: {spec.name} has one denoiser: remove expert {adapter.expert} of {adapter.path}"
            )
        of_network.setdefault(_NETWORKS[adapter.expert or "low"], []).append(adapter)
    return {network: MergedRead.of(its) for network, its in of_network.items()}


def check(spec: ModelSpec, adapters: Sequence[BaseAdapter]) -> None:
    """Check adapters against a model without its weights.

    Raises:
        ConfigError: see `merged_reads`; or an adapter cannot be read, or is for another model; the message names the
            path.
    """
    for network, reading in merged_reads(spec, adapters).items():
        reading.check({name: tuple(tensor.shape) for name, tensor in spec.build(network).state_dict().items()})
