"""One reward-feedback training step of a Wan image-to-video model, its frozen stages in engines."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from frostline.config import AUTO, GradientCheckpointing
from frostline.errors import ConfigError, DataError
from frostline.export.exporter import ensure_verified
from frostline.models.checkpoints.checkpoint_files import Entry
from frostline.models.checkpoints.loading import DEFERRABLE, load_components
from frostline.models.lora import read_adapter
from frostline.models.lora.inject import copy_adapter, lora_parameters, lora_scale, save_adapter
from frostline.models.wan.components import WanComponents
from frostline.models.wan.denoise_steps import DenoiseSteps
from frostline.models.wan.schedule import FlowMatchSchedule
from frostline.models.wan.vae import decode_latents, decoder_chunks
from frostline.models.wan.video_shape import TEMPORAL_STRIDE, VideoShape
from frostline.rewards.active import ActiveReward
from frostline.rewards.build import FrozenNetworks, build_rewards
from frostline.rewards.loss import reward_loss
from frostline.rewards.reward import RewardScore
from frostline.runtime.backends import TORCH
from frostline.runtime.cache import FrozenOutputCache
from frostline.runtime.device import free_bytes, resolve_device
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.runtime import PlanSetting, Runtime
from frostline.runtime.stage_timer import StageTime
from frostline.stages.shapes import ShapeRange
from frostline.stages.staged_model import stage_model
from frostline.train.memory.checkpointing import fitting_checkpointing
from frostline.train.memory.offload import saved_in_main_memory
from frostline.train.memory.recompute import decode_recomputed
from frostline.train.processes import mean_over_processes, process_count
from frostline.train.settings import TrainingModuleSettings
from frostline.train.step.conditioning import Conditioner, Conditioning
from frostline.train.step.rollout import Sampler

log = logging.getLogger(__name__)

# What the clock calls decoding with a gradient.
_DECODE = "vae_decoder_live"


@dataclass(frozen=True)
class StepMetrics:
    """What one `forward` measured.

    sample_id: names of the samples.
    per_sample: what the rewards measured of each, by name: every reward's score (`face_score`, …) and its further
        metrics (`detection_rate`, `face_score_missing_zero`, …).
    scores: of each reward, the sum over the samples that count, and how many those are.
    kl: of each tail step.
    stages: time in each use of a stage and its backend: by the stage's name where it is frozen, and of live uses by
        `denoise_tail`, `vae_decoder_live`, and what rewards compute, such as `face_embedder_live`.
    """

    sample_id: tuple[str, ...]
    per_sample: dict[str, list[float]]
    scores: dict[str, tuple[float, int]]
    kl: list[float]
    stages: dict[str, StageTime]


class WanTrainingModule(nn.Module):
    """Computes the reward and KL loss of a batch, gradient to the LoRA only.

    Args:
        components: a loaded Wan model; its denoiser receives LoRA layers in place.
        settings: see `TrainingModuleSettings`.
        plan, engines, strict: see `Runtime`.
        shapes: the range of shapes that engines serve; part of their key.
    """

    def __init__(
        self,
        components: WanComponents,
        settings: TrainingModuleSettings | None = None,
        *,
        plan: PlanSetting = AUTO,
        engines: str | Path | None = None,
        strict: bool = False,
        shapes: ShapeRange | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings or TrainingModuleSettings()
        self.components = components
        shapes = shapes or ShapeRange()
        self.rewards = build_rewards(self.settings.rewards, components.device, shapes)
        # Registered, so that they move with the module.
        self.reward_networks = FrozenNetworks(self.rewards)
        of_rewards = [stage for active in self.rewards for stage in active.stages]
        staged = stage_model(components, self.settings.lora, of_rewards, shapes)
        self.denoiser, self.denoiser_high_noise = staged.denoiser, staged.denoiser_high_noise
        self.lora_config, self.stages = staged.lora_config, staged.stages
        if engines is not None and plan != TORCH:
            ensure_verified(self.stages.values(), EngineStore(Path(engines)))
        if self.settings.torch_compile:
            for denoiser in filter(None, (self.denoiser, self.denoiser_high_noise)):
                denoiser.compile_blocks()
        self.runtime = Runtime(self.stages, plan, None if engines is None else Path(engines), strict)
        self.cache = self._open_cache()
        self.conditioner = Conditioner(components, self.runtime, self.rewards, self.cache)
        self.steps = DenoiseSteps.of(self.settings, components.boundary, self.denoiser_high_noise is not None)
        self.sampler = Sampler(
            components,
            self.denoiser,
            self.denoiser_high_noise,
            self.runtime,
            FlowMatchSchedule(self.settings.num_inference_steps, self.settings.shift),
            self.steps.high_noise,
        )
        self.gradient_checkpointing: GradientCheckpointing | None = None
        self._settled_for: VideoShape | None = None
        if self.settings.gradient_checkpointing != AUTO:
            self.checkpoint(self.settings.gradient_checkpointing)
        self.last_metrics: StepMetrics | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Sequence[Entry],
        *,
        engines: str | Path | None = "engines",
        plan: PlanSetting = AUTO,
        strict: bool = False,
        shapes: ShapeRange | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **settings: Any,
    ) -> Self:
        """Load a model and make it trainable.

        Args:
            model: `tiny`, `tiny-moe`, `tiny-ti2v`, a folder or a list of files; see `load_components`.
            settings: fields of `TrainingModuleSettings`; nested ones as mappings, e.g. `lora={"rank": 8}`.
        Raises:
            ConfigError: files or settings are not usable.
        """
        parsed = TrainingModuleSettings.parse(settings)
        components = load_components(model, dtype, resolve_device(str(device)), defer=DEFERRABLE)
        module = cls(components, parsed, plan=plan, engines=engines, strict=strict, shapes=shapes)
        module.runtime.release_weights()
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A module with weights, LoRA and stages of its own; the cache of frozen outputs is shared, by content."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.cache)] = self.cache
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a WanTrainingModule holds engines of this process and cannot be pickled: save the adapter with "
            "`module.save_adapter(folder)`, and call `from_pretrained` and `load_adapter` in the other process"
        )

    def _open_cache(self) -> FrozenOutputCache | None:
        settings = self.settings
        return FrozenOutputCache(settings.cache_dir, settings.cache_bytes) if settings.cache_bytes else None

    def forward_preprocess(self, data: Mapping[str, Any]) -> Conditioning:
        """Check `data` and compute its frozen conditions, from the cache where they are known.

        Args:
            data: `{"prompt": list[str], "video": float (B, T, C, H, W) in [0, 1]}`, optionally `"sample_id"`.
        Raises:
            DataError: names sample, field and what to do.
        """
        return self.conditioner(data)

    def forward(self, data: Mapping[str, Any], inputs: Conditioning | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One step: condition, rollout, tail, decode, reward, loss.

        Args:
            data: as for `forward_preprocess`; not looked at where `inputs` is given.
            inputs: what `forward_preprocess` returned, to use it again.
        Returns:
            loss (with graph), face_score (the first reward's score, whatever it rewards) and kl_loss, each 0-dim.
        Raises:
            DataError: `data` is not as it should be; names sample, field and what to do. Or `inputs` is none
                of `forward_preprocess`, or of that of another model.
            ConfigError: no step of the tail has a LoRA.
        """
        settings = self.settings
        self.steps.check_tail()
        conditioning = self.forward_preprocess(data) if inputs is None else self.conditioner.check(inputs)
        self._settle_for(conditioning)
        latents = self._rollout(conditioning)
        with self._saved_tensors():
            sampled = self.sampler.tail(
                latents,
                conditioning,
                settings.grad_start_step,
                settings.grad_end_step,
                recompute=self.gradient_checkpointing == "full",
                engine_forward=settings.engine_forward,
            )
            frames = self._decode(sampled.latents)
            scores = self.score(frames, conditioning)
        self._report_unscored(conditioning, scores)
        reward = reward_loss(scores, mean_over_processes)
        kl_loss = torch.stack(sampled.kl).mean()
        loss = reward.loss + settings.kl_weight * kl_loss
        self.last_metrics = self._metrics(conditioning, scores, reward.totals, sampled.kl)
        return loss, next(iter(reward.scores.values())), kl_loss.detach()

    def checkpoint(self, kind: GradientCheckpointing) -> None:
        """Recompute so much in backward from now on."""
        self.gradient_checkpointing = kind
        # Under "full" too: when a whole forward is recomputed, all its blocks at once would be too much.
        self.denoiser.checkpoint_blocks = kind != "none"

    def settle_checkpointing(self, shape: VideoShape) -> None:
        """Where gradient checkpointing is chosen by memory, choose it for steps of this shape.

        `forward` does so by itself for the first shape, and in a single process for each that is larger than those
        before.

        Raises:
            ConfigError: the weights are sharded already.
        """
        if self.settings.gradient_checkpointing == AUTO:
            # Takes a second to import.
            from torch.distributed.tensor import DTensor

            if any(isinstance(parameter, DTensor) for parameter in self.denoiser.parameters()):
                raise ConfigError(
                    "gradient_checkpointing: auto has to be settled before weights are sharded: call "
                    "settle_checkpointing(shape) first, or name the kind"
                )
            # What stages and engines have not loaded yet takes its part of what is free now.
            free = max(0, free_bytes(self.components.device) - self.runtime.pending_bytes())
            rewards = [active.reward for active in self.rewards]
            self.checkpoint(fitting_checkpointing(self.components, self.settings, shape, free, rewards))
            self._settled_for = shape

    def score(self, frames: Tensor, conditioning: Conditioning) -> list[tuple[ActiveReward, RewardScore]]:
        """What each reward says of generated (B, T, 3, H, W) frames in [0, 1], differentiable to the frames."""
        # In float32, whatever autocast the step runs in.
        with torch.autocast(frames.device.type, enabled=False):
            return [
                (active, active.score(frames, conditioning.sample, references, self.runtime))
                for active, references in zip(self.rewards, conditioning.references, strict=True)
            ]

    @torch.no_grad()
    def generate(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        """Sample videos with every stage frozen.

        Args:
            noise: (B, C, F, h, w), standard normal.
        Returns:
            (B, T, 3, H, W) in [0, 1].
        Raises:
            DataError: `conditioning` is none of `forward_preprocess`, or of that of another model.
        """
        conditioning = self.conditioner.check(conditioning)
        steps = self.settings.num_inference_steps
        latents, first = self.sampler.start(conditioning, noise, steps, None)
        latents = self.sampler.head(latents, conditioning, first, steps).to(
            self.components.vae.model.conv2.weight.dtype
        )
        return _to_frames(self.runtime["vae_decoder"](latents=latents)["video"])

    def noise(self, conditioning: Conditioning) -> Tensor:
        """The start noise (B, C, F, h, w): the same for every sample and step, or fresh ones.

        Drawn on the CPU, so that it does not depend on the device.
        """
        count, shape = len(conditioning.sample_id), conditioning.latent_shape
        device = conditioning.context.device
        if self.settings.noise_seed is None:
            return torch.randn(count, *shape).to(device)
        generator = torch.Generator().manual_seed(self.settings.noise_seed)
        return torch.randn(1, *shape, generator=generator).expand(count, *shape).to(device)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The LoRA matrices by name."""
        return lora_parameters(self.components.denoiser)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the LoRA as PEFT files."""
        assert self.lora_config is not None
        save_adapter(self.components.denoiser, self.lora_config, Path(folder))

    def load_adapter(self, folder: str | Path) -> None:
        """Copy the LoRA in PEFT files into this module's, whose memory stays the engines'.

        Raises:
            ConfigError: files are missing, or it is another adapter than this module's settings ask for.
        """
        assert self.lora_config is not None
        adapter = read_adapter(Path(folder)).uniform()
        if adapter.rank != self.settings.lora.rank:
            raise ConfigError(f"{folder}: the adapter has rank {adapter.rank}, not {self.settings.lora.rank}")
        if adapter.scale != lora_scale(self.components.denoiser):
            wanted = lora_scale(self.components.denoiser)
            raise ConfigError(f"{folder}: the adapter has a scale (alpha / rank) of {adapter.scale:g}, not {wanted:g}")
        copy_adapter(self.components.denoiser, adapter)

    def _settle_for(self, conditioning: Conditioning) -> None:
        if self.settings.gradient_checkpointing != AUTO or not torch.is_grad_enabled():
            return
        _, frames, height, width = conditioning.latent_shape
        stride = self.components.spatial_stride
        count = len(conditioning.sample_id)
        shape = VideoShape(count, TEMPORAL_STRIDE * (frames - 1) + 1, height * stride, width * stride)
        # One of several processes cannot choose alone: where weights are sharded, all gather them at the same moments.
        settled = self._settled_for
        larger = settled is not None and process_count() == 1 and shape.pixels > settled.pixels
        if self.gradient_checkpointing is None or larger:
            self.settle_checkpointing(shape)

    def _rollout(self, conditioning: Conditioning) -> Tensor:
        mid = self.settings.grad_start_step
        recallable = None if self.settings.noise_seed is None else self.conditioner
        latents, first = self.sampler.start(conditioning, self.noise(conditioning), mid, recallable)
        return self.sampler.head(latents, conditioning, first, mid)

    def _decode(self, latents: Tensor) -> Tensor:
        """(B, T, 3, H, W) float32 in [0, 1] from latents (B, C, F, h, w), gradient on."""
        vae, how = self.components.vae, self.gradient_checkpointing
        latents = latents.to(vae.model.conv2.weight.dtype)
        if how in (None, "none") or not torch.is_grad_enabled():
            with self.runtime.clock.measure(_DECODE, TORCH):
                return _to_frames(decode_latents(vae, latents))
        forward = recompute = decoder_chunks(vae)
        backend = TORCH
        if self.settings.engine_forward:
            backend, engines = self.runtime.networks_at("vae_decoder", {"latents": latents.detach()})
            # The stage's own networks in PyTorch are made to be traced, and slower.
            forward = recompute if backend == TORCH else engines
        with self.runtime.clock.measure(_DECODE, backend):
            video = decode_recomputed(forward, recompute, latents, whole=how == "full")
        return _to_frames(video)

    def _saved_tensors(self) -> AbstractContextManager[object]:
        """Where autograd keeps what backward needs."""
        if not self.settings.offload_saved_tensors or not torch.is_grad_enabled():
            return nullcontext()
        return saved_in_main_memory(
            itertools.chain(self.parameters(), self.buffers(), self.components.vae.parameters())
        )

    def _report_unscored(self, conditioning: Conditioning, scores: Sequence[tuple[ActiveReward, RewardScore]]) -> None:
        for active, score in scores:
            valid = zip(conditioning.sample_id, score.valid.tolist(), strict=True)
            missing = [name for name, is_valid in valid if not is_valid]
            if not missing:
                continue
            what = f"{active.name}: {active.reward.unscored}"
            message = f"{what} in the generated or the reference frames of sample {', '.join(missing)}"
            how = active.config.on_unscored
            if how == "error":
                raise DataError(f"{message}, field 'video'; on_unscored is 'error'")
            log.warning("%s: it gives no reward gradient (on_unscored: %s)", message, how)

    def _metrics(
        self,
        conditioning: Conditioning,
        scores: Sequence[tuple[ActiveReward, RewardScore]],
        totals: Mapping[str, tuple[Tensor, Tensor]],
        kl: list[Tensor],
    ) -> StepMetrics:
        per_sample = {}
        for active, score in scores:
            named = {active.name: score.score, **score.metrics}
            per_sample |= {name: values.tolist() for name, values in named.items()}
        return StepMetrics(
            sample_id=conditioning.sample_id,
            per_sample=per_sample,
            scores={name: (score.item(), int(count)) for name, (score, count) in totals.items()},
            kl=torch.stack(kl).tolist(),
            stages=self.runtime.clock.read(),
        )


def _to_frames(video: Tensor) -> Tensor:
    """(B, T, 3, H, W) float32 in [0, 1] of what the VAE gives, (B, 3, T, H, W) in [-1, 1]."""
    return (video.float().transpose(1, 2) + 1) / 2
