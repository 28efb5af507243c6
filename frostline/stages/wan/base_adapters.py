"""Which adapters are merged into which of Wan's denoisers before anything else sees the weights."""

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
    """Return how each denoiser that has adapters is read, by the name of the network.

    Raises:
        ConfigError: of two experts none is named, or one is where there is one denoiser; names the path.
    """
    of_network: dict[str, list[BaseAdapter]] = {}
    for number, adapter in enumerate(adapters):
        where = f"base_adapters.{number}.expert"
        if spec.two_experts and adapter.expert is None:
            raise ConfigError(f"{where}: {spec.name} has two experts: say whether {adapter.path} is for low or high")
        if not spec.two_experts and adapter.expert is not None:
            raise ConfigError(f"{where}: {spec.name} has one denoiser: leave {adapter.expert} of {adapter.path} out")
        of_network.setdefault(_NETWORKS[adapter.expert or "low"], []).append(adapter)
    return {network: MergedRead.of(its) for network, its in of_network.items()}


def check(spec: ModelSpec, adapters: Sequence[BaseAdapter]) -> None:
    """Hold adapters against a model without its weights.

    Raises:
        ConfigError: as `merged_reads`; or an adapter cannot be read, or is of another model; names the path.
    """
    for network, reading in merged_reads(spec, adapters).items():
        reading.check({name: tuple(tensor.shape) for name, tensor in spec.build(network).state_dict().items()})
