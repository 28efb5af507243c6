"""One reward-feedback training step of a video diffusion model, with frozen stages on engines."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor, nn

from frostline.config import AUTO, BaseAdapter, GradientCheckpointing, Quantization, QuantizationSettings
from frostline.errors import ConfigError, DataError
from frostline.models.block_offload import BlockOffload
from frostline.models.video_shape import VideoShape
from frostline.rewards.active import ActiveReward
from frostline.rewards.build import FrozenNetworks
from frostline.rewards.loss import reward_loss
from frostline.rewards.reward import RewardScore
from frostline.runtime.device import free_bytes, resolve_device
from frostline.runtime.runtime import PlanSetting, Runtime
from frostline.runtime.stage import Stage
from frostline.stages.families import family_of
from frostline.stages.shapes import ShapeRange
from frostline.stages.video_model import Expert, VideoModel
from frostline.train.memory.checkpointing import fitting_checkpointing
from frostline.train.memory.offload import saved_in_main_memory, saved_without_copies
from frostline.train.memory.tracker import tensors_of
from frostline.train.processes import mean_over_processes, process_count
from frostline.train.step.adapters import load_adapters, save_adapters, trainable_parameters, trained_experts
from frostline.train.step.conditioning import Conditioner, Conditioning
from frostline.train.step.decoding import decode_live, to_frames
from frostline.train.step.parts import build_parts
from frostline.train.step.result import StepMetrics, StepResult, step_result
from frostline.train.step.rollout import Leading, TailOptions, fixed_noise
from frostline.train.step_settings import TrainingModuleSettings

log = logging.getLogger(__name__)


class TrainingModule(nn.Module):
    """Computes the reward and KL loss of a batch; gradients flow only to the LoRA weights.

    Args:
        components: a loaded model of any family; LoRA layers are added to its denoiser in place.
        settings: see `TrainingModuleSettings`.
        plan, engines, strict: see `Runtime`.
        shapes: the range of shapes that engines support; part of their key.
    """

    def __init__(
        self,
        components: Any,
        settings: TrainingModuleSettings | None = None,
        *,
        plan: PlanSetting = AUTO,
        engines: str | Path | None = None,
        strict: bool = False,
        shapes: ShapeRange | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings or TrainingModuleSettings()
        store = None if engines is None else Path(engines)
        self.parts = build_parts(components, self.settings, plan, store, strict, shapes or ShapeRange())
        # Registered, so that they move with the module.
        for expert in self.model.experts:
            self.add_module(expert.stage, cast(nn.Module, expert.module))
        self.reward_networks = FrozenNetworks(self.rewards)
        self.gradient_checkpointing: GradientCheckpointing | None = None
        self._settled_for: VideoShape | None = None
        if self.settings.gradient_checkpointing != AUTO:
            self.checkpoint(self.settings.gradient_checkpointing)
        self.last_metrics: StepMetrics | None = None
        # Weight for the next step; the training loop adapts it if there is a `kl_target`.
        self.kl_weight = self.settings.kl_weight

    @property
    def model(self) -> VideoModel:
        """Return the video model with its LoRA."""
        return self.parts.model

    @property
    def components(self) -> Any:
        """Return the loaded components."""
        return self.model.components

    @property
    def runtime(self) -> Runtime:
        """Return the runtime of the frozen stages."""
        return self.parts.runtime

    @property
    def stages(self) -> dict[str, Stage]:
        """Return the frozen stages by name."""
        return self.runtime.stages

    @property
    def conditioner(self) -> Conditioner:
        """Return the conditioner, which computes frozen inputs."""
        return self.parts.conditioner

    @property
    def rewards(self) -> tuple[ActiveReward, ...]:
        """Return the rewards with their settings for the loss."""
        return self.parts.rewards

    @property
    def trained_experts(self) -> tuple[Expert, ...]:
        """Return the denoisers with a LoRA; the one for high noise levels comes first."""
        return trained_experts(self.model)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Sequence[Any],
        *,
        engines: str | Path | None = "engines",
        plan: PlanSetting = AUTO,
        strict: bool = False,
        shapes: ShapeRange | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        base_adapters: Sequence[BaseAdapter | Mapping[str, Any]] = (),
        quantization: Quantization = "none",
        text_encoder_quantization: Quantization = "none",
        offload_blocks: int = 0,
        **settings: Any,
    ) -> Self:
        """Load a model and add a trainable LoRA.

        Args:
            model: `tiny`, `tiny-moe`, `tiny-ti2v`, a folder or a list of files; see `family_of`.
            base_adapters: merged into the denoisers each time these are read; mappings as in the settings of a run.
            quantization, text_encoder_quantization: see `QuantizationSettings`.
            offload_blocks: number of blocks of each denoiser that are offloaded to main memory; see `BlockOffload`.
            settings: fields of `TrainingModuleSettings`; nested ones as mappings, e.g. `lora={"rank": 8}`.
        Raises:
            ConfigError: files or settings are invalid.
        """
        parsed = TrainingModuleSettings.parse(settings)
        adapters = BaseAdapter.parse_all(base_adapters)
        stored = QuantizationSettings.parse(
            {"quantization": quantization, "text_encoder_quantization": text_encoder_quantization}
        )
        where = resolve_device(str(device))
        components = family_of(model).load(model, dtype, where, True, adapters, True, stored, offload_blocks)
        module = cls(components, parsed, plan=plan, engines=engines, strict=strict, shapes=shapes)
        module.runtime.release_weights()
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a module with its own weights, LoRA and stages; the cache of frozen outputs is shared."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.parts.cache)] = self.parts.cache
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a training module contains engines of this process and cannot be pickled: save the "
            "adapter with `module.save_adapter(folder)`, and call `from_pretrained` and "
            "`load_adapter` in the other process"
        )

    def forward_preprocess(self, data: Mapping[str, Any]) -> Conditioning:
        """Check `data` and compute its frozen conditions, or read them from the cache.

        Args:
            data: `{"prompt": list[str], "video": float (B, T, C, H, W)}` with values in [0, 1], optionally
                `"sample_id"`, `"valid_frames"`, `"reference"` and `"fps"`; see `check_batch`.
        Raises:
            DataError: `data` is invalid; the message names sample, field and remedy.
        """
        return self.conditioner(data)

    def forward(self, data: Mapping[str, Any], inputs: Conditioning | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute a step (see `step`), and store its metrics in `last_metrics`.

        Returns:
            loss (with graph), face_score (the first reward's score, for any reward) and kl_loss, each 0-dim.
        """
        result = self.step(data, inputs)
        self.last_metrics = result.metrics
        return result.loss, result.score, result.kl_loss

    def step(self, data: Mapping[str, Any], inputs: Conditioning | None = None) -> StepResult:
        """Compute one step: condition, rollout, tail, decode, reward, loss.

        Args:
            data: see `forward_preprocess`; ignored if `inputs` is given.
            inputs: the return value of `forward_preprocess`, for reuse.
        Raises:
            DataError: `data` is invalid (the message names sample, field and remedy); `inputs` was not created by
                `forward_preprocess` of this model; or a reward with `on_unscored: error` cannot score a sample.
            ConfigError: no step of the tail has a LoRA.
        """
        settings = self.settings
        steps = self.parts.steps
        steps.check_live()
        with self.runtime.clock.collect() as times:
            conditioning = self.forward_preprocess(data) if inputs is None else self.conditioner.check(inputs)
            self._settle_for(conditioning)
            live = steps.draw()
            latents = self._rollout(conditioning, live)
            with self._saved_tensors():
                options = TailOptions(self.gradient_checkpointing == "full", settings.engine_forward)
                sampled = self.parts.sampler.tail(latents, conditioning, live, options)
                rewarded = conditioning.repeated(steps.clips)
                scores = self.score(self._decode(sampled.latents, rewarded), rewarded, sampled.latents)
                sft = None
                if conditioning.clip_latents is not None:
                    loss = self.parts.sampler.data_loss(*conditioning.clip_latents, conditioning.conditions, options)
                    sft = settings.sft_weight, loss
        self._report_unscored(rewarded, scores)
        reward = reward_loss(scores, mean_over_processes)
        stages = times.read()
        return step_result(rewarded.sample_id, scores, reward, sampled, self.kl_weight, sft, stages)

    def checkpoint(self, kind: GradientCheckpointing) -> None:
        """Set what backward recomputes from now on."""
        self.gradient_checkpointing = kind
        # Also with "full": when a whole forward pass is recomputed, the activations of all blocks would need too much
        # memory. Also for an expert without a LoRA, because the gradient may pass through it.
        for expert in self.model.experts:
            expert.module.checkpoint_blocks = kind != "none"

    def settle_checkpointing(self, shape: VideoShape) -> None:
        """Choose gradient checkpointing for steps of this shape by the free memory, if the setting is `auto`.

        `forward` calls this for the first shape and, in a single process, for each larger shape.

        Raises:
            ConfigError: the weights are already sharded.
        """
        if self.settings.gradient_checkpointing == AUTO:
            from torch.distributed.tensor import DTensor  # takes a second to import

            parameters = (parameter for expert in self.model.experts for parameter in expert.module.parameters())
            if any(isinstance(parameter, DTensor) for parameter in parameters):
                raise ConfigError(
                    "gradient_checkpointing: auto must be settled before weights are sharded: call "
                    "settle_checkpointing(shape) first, or set the kind"
                )
            # Reserve memory for stages and engines that are not loaded yet.
            reserved = self.runtime.pending_bytes() + sum(each.window_bytes for each in self._offloads)
            free = max(0, free_bytes(self.model.device) - reserved)
            rewards = [active.reward for active in self.rewards]
            self.checkpoint(fitting_checkpointing(self.model, self.settings, shape, free, rewards))
            self._settled_for = shape

    def score(
        self, frames: Tensor, conditioning: Conditioning, latents: Tensor | None = None
    ) -> list[tuple[ActiveReward, RewardScore]]:
        """Score generated (B, T, 3, H, W) frames in [0, 1] with each reward; differentiable with respect to the frames.

        Args:
            latents: (B, C, F, h, w) from which the frames were decoded; scores are differentiable with respect to them,
                too.
        """
        sample = replace(conditioning.sample, latents=latents)
        # In float32, independent of the autocast of the step.
        with torch.autocast(frames.device.type, enabled=False):
            return [
                (active, active.score(frames, sample, references, self.runtime))
                for active, references in zip(self.rewards, conditioning.references, strict=True)
            ]

    @torch.no_grad()
    def generate(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        """Sample videos with all stages frozen: `generate_latents`, then decode.

        Args:
            noise: (B, C, F, h, w), standard normal.
        Returns:
            (B, T, 3, H, W) in [0, 1].
        Raises:
            DataError: `conditioning` was not created by `forward_preprocess` of this model.
        """
        return self.decode(self.generate_latents(conditioning, noise))

    @torch.no_grad()
    def generate_latents(self, conditioning: Conditioning, noise: Tensor, comes_again: bool = False) -> Tensor:
        """Sample latents (B, C, F, h, w) float32 with all stages frozen; see `generate`.

        Args:
            comes_again: whether the same noise will be used for these samples again, so that the latents after the
                leading steps without LoRA are cached.
        """
        conditioning = self.conditioner.check(conditioning)
        steps, sampler = self.settings.num_inference_steps, self.parts.sampler
        latents, first = sampler.start(conditioning, noise, steps, self.conditioner if comes_again else None)
        return sampler.head(latents, conditioning.conditions, first, steps)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, F, h, w) to frames (B, T, 3, H, W) in [0, 1], frozen."""
        decoder = self.model.decoder()
        return to_frames(self.runtime[decoder.stage](latents=latents.to(decoder.dtype))["video"])

    def noise(self, conditioning: Conditioning) -> Tensor:
        """Return the start noise (B, C, F, h, w): the same for every sample and step, or fresh noise.

        Generated on the CPU, so that it does not depend on the device.
        """
        count, shape = len(conditioning.sample_id), conditioning.latent_shape
        device = conditioning.device
        if self.settings.noise_seed is None:
            return torch.randn(count, *shape).to(device)
        return fixed_noise(self.settings.noise_seed, count, shape).to(device)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the LoRA matrices by name; with two trained experts, names have the prefix `high_noise.` or
        `low_noise.`.
        """
        return trainable_parameters(self.model)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the LoRA as PEFT files; for two experts, to the subfolders `high_noise/` and `low_noise/`."""
        save_adapters(self.model, Path(folder))

    def load_adapter(self, folder: str | Path) -> None:
        """Copy a LoRA into this module's LoRA, in place, so that engines stay bound to it; see `load_adapters`.

        Raises:
            ConfigError: files are missing, or the adapter does not match this module's settings.
        """
        load_adapters(self.model, Path(folder), self.settings.lora)

    def _settle_for(self, conditioning: Conditioning) -> None:
        if self.settings.gradient_checkpointing != AUTO or not torch.is_grad_enabled():
            return
        _, frames, height, width = conditioning.latent_shape
        geometry, count = self.model.geometry, len(conditioning.sample_id)
        stride = geometry.spatial_stride
        shape = VideoShape(count, geometry.num_frames(frames), height * stride, width * stride)
        # With sharded weights, a process cannot choose alone: all processes gather the weights at the same time.
        settled = self._settled_for
        larger = settled is not None and process_count() == 1 and shape.pixels > settled.pixels
        if self.gradient_checkpointing is None or larger:
            self.settle_checkpointing(shape)

    def _rollout(self, conditioning: Conditioning, live: Sequence[int]) -> Tensor:
        """Return the latents before the first live step with a LoRA."""
        steps, sampler, stale = self.parts.steps, self.parts.sampler, self.parts.stale
        recallable = None if self.settings.noise_seed is None else self.conditioner
        noise = self.noise(conditioning)
        until = steps.with_lora(live)[0]
        if self.settings.rollout.policy == "base":
            return sampler.start(conditioning, noise, until, recallable, base=True)[0]
        latents, first = sampler.start(conditioning, noise, until, recallable)

        def head(rows: list[int]) -> Tensor:
            given = {name: tensor[rows] for name, tensor in conditioning.conditions.items()}
            return sampler.head(latents[rows], given, first, until)

        if stale is None:
            return sampler.head(latents, conditioning.conditions, first, until)
        stale.check_counted(self.trainable_parameters().values())
        full_keys = Leading(conditioning.keys, (), dict, noise).full_keys
        keys = [f"{key} {until}" for key in full_keys]
        return stale.reuse(keys, head, latents.device)

    def _decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the frames that rewards use: the first frame, and those of the window or of the whole clip."""
        window, how = self.settings.decode.draw(latents.shape[2]), self.gradient_checkpointing
        decoder, engine_forward = self.model.decoder(), self.settings.engine_forward
        frames = decode_live(decoder, latents, self.runtime, how, engine_forward, window)
        return torch.cat([conditioning.sample.video[:, :1].to(frames), frames], dim=1) if window.start else frames

    @property
    def _offloads(self) -> list[BlockOffload]:
        return [expert.module.offload for expert in self.model.experts if expert.module.offload is not None]

    def _saved_tensors(self) -> AbstractContextManager[object]:
        """Set where autograd stores the tensors for backward."""
        # Checkpointed blocks copy their weights again when they are recomputed.
        offloads = self._offloads if self.gradient_checkpointing == "none" else []
        if not torch.is_grad_enabled():
            return nullcontext()
        if not self.settings.offload_saved_tensors:
            return saved_without_copies(offloads) if offloads else nullcontext()
        return saved_in_main_memory(tensors_of(self, *self.model.modules()), offloads)

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
            log.warning("%s: such a sample has no reward gradient (on_unscored: %s)", message, how)
