"""The components of a loaded Wan model, as diffsynth's own objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from frostline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from diffsynth.models.wan_video_dit import WanModel
    from diffsynth.models.wan_video_image_encoder import WanImageEncoder
    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer, WanTextEncoder
    from diffsynth.models.wan_video_vae import WanVideoVAE
    from torch import nn

    from frostline.models.lazy_weights import PartWeights

    from .model_spec import ModelSpec


@dataclass(frozen=True)
class WanComponents:
    """A loaded Wan model; all its parts are frozen and in eval mode.

    Attributes:
        spec: description of the model; the properties below depend on it.
        weights: by stage name, the weights of frozen parts that can be released and read again.
        offload_blocks: number of blocks of each denoiser whose weights are kept in main memory.

    Raises:
        ConfigError: the networks do not match `spec`.
    """

    spec: ModelSpec
    text_encoder: WanTextEncoder
    tokenizer: HuggingfaceTokenizer
    vae: WanVideoVAE
    denoiser: WanModel
    denoiser_high_noise: WanModel | None = None
    image_encoder: WanImageEncoder | None = None
    weights: Mapping[str, PartWeights] = field(default_factory=dict)
    offload_blocks: int = 0

    def __post_init__(self) -> None:
        optional = {name for name in ("denoiser_high_noise", "image_encoder") if getattr(self, name) is not None}
        there, wanted = {"text_encoder", "vae", "denoiser", *optional}, {*self.spec.networks}
        if there != wanted:
            raise ConfigError(f"{self.name}: the spec has the networks {sorted(wanted)}, the model has {sorted(there)}")
        for name, module in self.modules():
            _check_size(f"{self.name}: {name}", module, self.spec.networks[name])
        _check_size(f"{self.name}: tokenizer", self.tokenizer, {"seq_len": self.text_length})

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the loaded networks by field name."""
        for name in self.spec.networks:
            yield name, getattr(self, name)

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.denoiser.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the denoiser, its latents and its conditions."""
        return self.denoiser.patch_embedding.weight.dtype

    @property
    def name(self) -> str:
        """See `ModelSpec`."""
        return self.spec.name

    @property
    def license(self) -> str | None:
        """See `ModelSpec`."""
        return self.spec.license

    @property
    def boundary(self) -> float:
        """See `ModelSpec`."""
        return self.spec.boundary

    @property
    def text_length(self) -> int:
        """See `ModelSpec`."""
        return self.spec.text_length

    @property
    def takes_image_latents(self) -> bool:
        """See `ModelSpec`."""
        return self.spec.takes_image_latents

    @property
    def takes_clip_feature(self) -> bool:
        """See `ModelSpec`."""
        return self.spec.takes_clip_feature

    @property
    def pins_first_frame(self) -> bool:
        """See `ModelSpec`."""
        return self.spec.pins_first_frame


def _check_size(what: str, module: Any, arguments: Mapping[str, Any]) -> None:
    """Check the stored constructor arguments of a module."""
    inner = getattr(module, "model", module)  # diffsynth wraps the VAE
    for name, value in arguments.items():
        if (found := vars(inner).get(name, value)) != value:
            raise ConfigError(f"{what} has {name} {found}, but the spec states {value}")
