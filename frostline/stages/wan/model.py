"""Wan as a `VideoModel`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from frostline.models.block_offload import BlockOffload
from frostline.models.lazy_weights import VAE_ENCODER
from frostline.models.lora.inject import inject_loras
from frostline.models.video_shape import Geometry, VideoShape
from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.image import ImageEncoder
from frostline.models.wan.text import TextEncoder
from frostline.models.wan.vae import decode_from, decode_latents, decoder_chunks
from frostline.models.wan.vae_chunks import decode_in_chunks, decoder_caches
from frostline.models.wan.video_shape import CLIP_FEATURE, MASK_CHANNELS
from frostline.stages.video_model import Decoder, Expert, FrozenCall

from . import denoiser, image_encoder, text_encoder, vae_decoder, vae_encoder
from .conditions import CLIP, CONTEXT, FIRST_FRAME, IMAGE_LATENTS, clip_latents, condition_names, conditions, cut_prompt
from .inputs import StageInputs
from .uses import step_uses

if TYPE_CHECKING:
    from peft import LoraConfig

    from frostline.config import LoraSettings
    from frostline.models.denoise_steps import DenoiseSteps
    from frostline.models.wan.components import WanComponents
    from frostline.runtime.stage import Stage, Tensors
    from frostline.stages.conditions import Condition, ConditionInputs
    from frostline.stages.provider import Stages, Use
    from frostline.stages.shapes import ShapeRange

log = logging.getLogger(__name__)

# The stages of the denoisers; a model with one expert has only the first.
_LOW, _HIGH = "denoiser", "denoiser_high_noise"
# One line for each stage; each is a module with a function `build`.
_BUILDERS = (
    text_encoder.build,
    image_encoder.build,
    vae_encoder.build,
    denoiser.build,
    denoiser.build_high_noise,
    vae_decoder.build,
)


@dataclass
class WanVideoModel:
    """A Wan model with its LoRA; see `VideoModel` for the methods.

    Attributes:
        denoiser: the denoiser for low noise levels, if there are two experts.
        lora_config: configuration of each LoRA; None without a LoRA.
        trained: names of the stages whose denoisers have a LoRA.
    """

    components: WanComponents
    denoiser: Denoiser
    denoiser_high_noise: Denoiser | None
    lora_config: LoraConfig | None
    trained: tuple[str, ...] = ()
    _told_of_a_cut_prompt: bool = field(default=False, init=False)

    @classmethod
    def of(cls, components: WanComponents, lora: LoraSettings | None) -> WanVideoModel:
        """Return a model of `components`, with a LoRA injected in place, if one is given.

        Raises:
            ConfigError: the model does not have the experts or layers that the LoRA adapts.
        """
        high_noise = components.denoiser_high_noise
        config, trained = None, ()
        if lora is not None:
            lora.check_experts(high_noise is not None)
            # The low-noise expert first, so that its LoRA does not depend on whether the other expert has one.
            adapted = {_LOW: components.denoiser} if lora.has_lora("low") else {}
            if high_noise is not None and lora.has_lora("high"):
                adapted[_HIGH] = high_noise
                if _HIGH in components.weights:
                    components.weights[_HIGH].restore()
            config = inject_loras([*adapted.values()], lora.rank, lora.alpha, lora.target_modules)
            trained = tuple(adapted)
        high = None if high_noise is None else Denoiser(high_noise)
        model = cls(components, Denoiser(components.denoiser), high, config, trained)
        if components.offload_blocks:
            for expert in model.experts:
                expert.module.offload = BlockOffload(expert.module.blocks, components.offload_blocks)
        return model

    @property
    def name(self) -> str:
        return self.components.name

    @property
    def geometry(self) -> Geometry:
        return self.components.spec.geometry

    @property
    def latent_channels(self) -> int:
        return self.components.spec.latent_channels

    @property
    def dtype(self) -> torch.dtype:
        return self.components.dtype

    @property
    def device(self) -> torch.device:
        return self.components.device

    @property
    def boundary(self) -> float:
        return self.components.boundary

    @property
    def needs_image(self) -> bool:
        return self.components.spec.needs_image

    @property
    def experts(self) -> tuple[Expert, ...]:
        low = Expert(_LOW, self.denoiser, self.components.denoiser, trained=_LOW in self.trained)
        high, network = self.denoiser_high_noise, self.components.denoiser_high_noise
        if high is None or network is None:
            return (low,)
        return Expert(_HIGH, high, network, trained=_HIGH in self.trained), low

    @property
    def condition_names(self) -> tuple[str, ...]:
        return condition_names(self.components)

    def stages(self, shapes: ShapeRange) -> list[Stage]:
        """Return the stages that the model has."""
        inputs = StageInputs(self.components, self.denoiser, self.denoiser_high_noise, shapes)
        return [stage for build in _BUILDERS if (stage := build(inputs)) is not None]

    def conditions(self, inputs: ConditionInputs, run: Stages) -> list[Condition]:
        """Return the conditions; warn once if a prompt is too long."""
        if not self._told_of_a_cut_prompt and (message := cut_prompt(self.components, inputs)) is not None:
            self._told_of_a_cut_prompt = True
            log.warning("%s; further prompts that are too long are not reported", message)
        return conditions(self.components, inputs, run)

    def clip_latents(self, video: Tensor, run: Stages) -> Condition:
        """Return the latents of clips."""
        return clip_latents(self.components, video, run)

    def denoiser_inputs(self, conditions: Tensors) -> dict[str, Tensor]:
        """Return all conditions except the first-frame latents, which `constrain` uses."""
        return {name: tensor for name, tensor in conditions.items() if name != FIRST_FRAME}

    def constrain(self, latents: Tensor, conditions: Tensors) -> Tensor:
        """Restore the given first-frame latents, if the model keeps them fixed."""
        if FIRST_FRAME not in conditions:
            return latents
        return torch.cat([conditions[FIRST_FRAME].to(latents.dtype), latents[:, :, 1:]], dim=2)

    def decoder(self) -> Decoder:
        """Return the decoder; its networks are for the first latent frame and for each following one."""
        vae = self.components.vae
        return Decoder(
            stage="vae_decoder",
            dtype=vae.model.conv2.weight.dtype,
            whole=partial(decode_latents, vae),
            networks=decoder_chunks(vae),
            assemble=decode_in_chunks,
            caches=decoder_caches,
            go_on=partial(decode_from, vae),
        )

    def uses(self, steps: DenoiseSteps) -> list[Use]:
        """Return the uses of stages in a step."""
        return step_uses(steps, clip=self.components.takes_clip_feature)

    def modules(self) -> list[nn.Module]:
        """Return the networks, including the tables of the denoisers."""
        parts = (self.components.text_encoder, self.components.image_encoder, self.components.vae)
        denoisers = (self.denoiser, self.denoiser_high_noise)
        return [module for module in (*parts, *denoisers) if module is not None]

    def stage_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each stage; the two stages of the VAE share none."""
        components = self.components
        vae = dict(components.vae.named_parameters())
        encoder = {name: parameter for name, parameter in vae.items() if name.startswith(VAE_ENCODER)}
        parameters = {"text_encoder": [*components.text_encoder.parameters()], "vae_encoder": [*encoder.values()]}
        if components.image_encoder is not None:
            parameters["image_encoder"] = [*components.image_encoder.parameters()]
        parameters[_LOW] = [p for p in components.denoiser.parameters() if not p.requires_grad]
        parameters["vae_decoder"] = [parameter for name, parameter in vae.items() if name not in encoder]
        if components.denoiser_high_noise is not None:
            parameters[_HIGH] = [p for p in components.denoiser_high_noise.parameters() if not p.requires_grad]
        return parameters

    def frozen_calls(self, shape: VideoShape) -> dict[str, FrozenCall]:
        """Return a call of each encoder."""
        components = self.components
        size = (shape.batch_size, components.text_length)
        tokens = torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.int64)
        text_encoder = TextEncoder(components.text_encoder)
        calls = {"text_encoder": FrozenCall(text_encoder, text_encoder, tokens)}
        pixels = (shape.height, shape.width)
        if components.image_encoder is not None:
            encoder = ImageEncoder(components.image_encoder)
            image = torch.zeros(shape.batch_size, 3, *pixels, dtype=self.dtype)
            calls["image_encoder"] = FrozenCall(encoder, encoder, (image,))
        # If the first frame stays fixed during sampling, only that frame is encoded.
        frames = 1 if components.pins_first_frame else shape.num_frames
        video = torch.zeros(shape.batch_size, 3, frames, *pixels, dtype=self.dtype)
        vae = cast(Any, components.vae)
        calls["vae_encoder"] = FrozenCall(vae, lambda clip: vae.model.encode(clip, vae.scale), (video,))
        return calls

    def denoiser_sample(self, shape: VideoShape) -> dict[str, Tensor]:
        """Return zeros as inputs of the denoiser."""
        count, channels, dtype = shape.batch_size, self.latent_channels, self.dtype
        grid = self.geometry.latent_grid(shape.num_frames, shape.height, shape.width)
        shapes = {
            CONTEXT: (self.components.text_length, self.components.text_encoder.dim),
            IMAGE_LATENTS: (channels + MASK_CHANNELS, *grid),
            CLIP: CLIP_FEATURE,
        }
        return {
            "latents": torch.zeros(count, channels, *grid, dtype=dtype),
            "timestep": torch.zeros(count),
            **{name: torch.zeros(count, *shapes[name], dtype=dtype) for name in self.condition_names if name in shapes},
        }
