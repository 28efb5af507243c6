"""The toy family as a `VideoModel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from frostline.stages.toy.networks import (  # type: ignore[import-not-found]
    CHANNELS,
    SIDE,
    TEXT_LENGTH,
    VOCABULARY,
    WIDTH,
    FrameEncoder,
    LatentDecoder,
    ToyDenoiser,
    ToyTextEncoder,
    ToyVae,
    tokenize,
)
from torch import Tensor, nn

from frostline.config import LoraSettings
from frostline.models.denoise_steps import DenoiseSteps
from frostline.models.lora.inject import inject_lora
from frostline.models.video_shape import Geometry, VideoShape
from frostline.runtime.cache import content_key
from frostline.runtime.stage import Network, Stage, Tensors, TensorSpec
from frostline.stages.conditions import Condition, ConditionInputs
from frostline.stages.denoiser import denoiser_stage, random_timesteps
from frostline.stages.provider import Stages, Use
from frostline.stages.shapes import ShapeRange
from frostline.stages.tolerances import tolerance
from frostline.stages.video_model import Decoder, Expert, FrozenCall

GEOMETRY = Geometry(temporal_stride=8, spatial_stride=SIDE, spatial_multiple=16)


@dataclass(frozen=True)
class ToyComponents:
    name: str
    text_encoder: Any
    vae: Any
    denoiser: Any

    @classmethod
    def random(cls, name: str, seed: int) -> ToyComponents:
        torch.manual_seed(seed)
        parts = (ToyTextEncoder(), ToyVae(), ToyDenoiser())
        return cls(name, *(part.eval().requires_grad_(False) for part in parts))


class ToyVideoModel:
    geometry = GEOMETRY
    latent_channels = CHANNELS
    boundary = 0.0
    needs_image = True
    condition_names = ("context", "pooled", "first_frame")

    def __init__(self, components: ToyComponents, lora: LoraSettings | None) -> None:
        denoiser = components.denoiser
        self.components, self.name = components, components.name
        self.lora_config = None
        if lora is not None:
            self.lora_config = inject_lora(denoiser, lora.rank, lora.alpha, lora.target_modules or ("proj",))
        self.experts = (Expert("denoiser", denoiser, denoiser, trained=lora is not None),)

    @property
    def dtype(self) -> torch.dtype:
        return self.components.vae.first.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.components.vae.first.weight.device

    def stages(self, shapes: ShapeRange) -> list[Stage]:
        parts, dtype, batch = self.components, self.dtype, shapes.dimension("batch")
        frames, sides = shapes.dimension("latent_frames"), [shapes.pixels(name, 2, 16) for name in ("height", "width")]
        pixels = [shapes.pixels(name, 16, 16) for name in ("height", "width")]

        def ids(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
            return torch.randint(0, VOCABULARY, shape, generator=generator)

        def stage(name: str, module: nn.Module, spec: TensorSpec, *outputs: str) -> Stage:
            networks = (Network(name, module.eval(), (spec,), outputs),)
            return Stage(name=name, model=self.name, networks=networks, tolerance=tolerance(dtype))

        latents = TensorSpec("latents", (batch, CHANNELS, frames, *sides), dtype)
        inputs = (
            latents,
            TensorSpec("timestep", (batch,), fill=random_timesteps),
            TensorSpec("context", (batch, TEXT_LENGTH, WIDTH), dtype),
            TensorSpec("pooled", (batch, WIDTH), dtype),
            TensorSpec("first_frame", (batch, CHANNELS, 1, *sides), dtype),
        )
        text = TensorSpec("ids", (batch, TEXT_LENGTH), torch.int64, ids)
        return [
            stage("text_encoder", parts.text_encoder, text, "context", "pooled"),
            stage("frame_encoder", FrameEncoder(parts.vae), TensorSpec("image", (batch, 3, *pixels), dtype), "latents"),
            denoiser_stage(
                *("denoiser", parts.denoiser, parts.denoiser, inputs, shapes.dimension("rank")),
                model=self.name,
                tolerance=tolerance(dtype),
            ),
            stage("vae_decoder", LatentDecoder(parts.vae), latents, "video"),
        ]

    def conditions(self, inputs: ConditionInputs, run: Stages) -> list[Condition]:
        ids, images = tokenize(inputs.prompts).to(self.device), inputs.first_frame.to(self.device, self.dtype) * 2 - 1
        of_text, of_image = (tuple(content_key(row=row) for row in rows) for rows in (ids, inputs.first_frame))
        return [
            Condition("context", ("text_encoder",), of_text, lambda rows: run["text_encoder"](ids=ids[rows])),
            Condition("pooled", ("text_encoder",), of_text, lambda rows: run["text_encoder"](ids=ids[rows])),
            Condition(
                *("first_frame", ("frame_encoder",), of_image),
                lambda rows: {"first_frame": run["frame_encoder"](image=images[rows])["latents"]},
            ),
        ]

    def clip_latents(self, video: Tensor, run: Stages) -> Condition:
        def encode(rows: list[int]) -> dict[str, Tensor]:
            frames = video[rows, :: GEOMETRY.temporal_stride].to(self.device, self.dtype).unbind(1)
            latents = [run["frame_encoder"](image=frame * 2 - 1)["latents"] for frame in frames]
            return {"clip_latents": torch.cat(latents, dim=2)}

        return Condition("clip_latents", ("frame_encoder",), tuple(content_key(clip=clip) for clip in video), encode)

    def denoiser_inputs(self, conditions: Tensors) -> Tensors:
        return conditions

    def constrain(self, latents: Tensor, conditions: Tensors) -> Tensor:
        return torch.cat([conditions["first_frame"].to(latents.dtype), latents[:, :, 1:]], dim=2)

    def decoder(self) -> Decoder:
        decode = self.components.vae.decode
        networks = {"vae_decoder": lambda latents: {"video": decode(latents)}}

        def behind(compute: Any, latents: Tensor, caches: Tensors) -> Tensor:
            whole = compute(latents=torch.cat([caches["latents"], latents], dim=2))["video"]
            return whole[:, :, -latents.shape[2] * GEOMETRY.temporal_stride :]

        def assemble(on: Any, latents: Tensor, caches: Tensors | None) -> Tensor:
            compute = on["vae_decoder"]
            return compute(latents=latents)["video"] if caches is None else behind(compute, latents, caches)

        return Decoder(
            stage="vae_decoder",
            dtype=self.dtype,
            whole=decode,
            networks=networks,
            assemble=assemble,
            caches=lambda on, latents: {"latents": latents},
            go_on=lambda latents, caches: behind(networks["vae_decoder"], latents, caches),
        )

    def uses(self, steps: DenoiseSteps) -> list[Use]:
        return [
            Use("text_encoder", False, 1, "conditioning"),
            Use("frame_encoder", False, 1 + steps.on_data, "conditioning"),
            Use("denoiser", False, steps.end + 1 - steps.live_with_lora, "rollout"),
            Use("denoiser", True, steps.live_uses, "tail"),
            Use("denoiser", False, steps.kl_uses, "tail"),
            Use("vae_decoder", True, steps.clips, "decode"),
        ]

    def modules(self) -> list[nn.Module]:
        return [self.components.text_encoder, self.components.vae, self.components.denoiser]

    def stage_parameters(self) -> dict[str, list[nn.Parameter]]:
        parts = self.components
        return {
            "text_encoder": [*parts.text_encoder.parameters()],
            "frame_encoder": [*parts.vae.first.parameters()],
            "denoiser": [p for p in parts.denoiser.parameters() if not p.requires_grad],
            "vae_decoder": [*parts.vae.up.parameters()],
        }

    def frozen_calls(self, shape: VideoShape) -> dict[str, FrozenCall]:
        encoder, vae, count = self.components.text_encoder, self.components.vae, shape.batch_size
        image = torch.zeros(count, 3, shape.height, shape.width, dtype=self.dtype)
        ids = torch.zeros(count, TEXT_LENGTH, dtype=torch.int64)
        return {
            "text_encoder": FrozenCall(encoder, encoder, (ids,)),
            "frame_encoder": FrozenCall(vae, vae.encode_frame, (image,)),
        }

    def denoiser_sample(self, shape: VideoShape) -> dict[str, Tensor]:
        count, dtype = shape.batch_size, self.dtype
        frames, *grid = GEOMETRY.latent_grid(shape.num_frames, shape.height, shape.width)
        return {
            "latents": torch.zeros(count, CHANNELS, frames, *grid, dtype=dtype),
            "timestep": torch.zeros(count),
            "context": torch.zeros(count, TEXT_LENGTH, WIDTH, dtype=dtype),
            "pooled": torch.zeros(count, WIDTH, dtype=dtype),
            "first_frame": torch.zeros(count, CHANNELS, 1, *grid, dtype=dtype),
        }
