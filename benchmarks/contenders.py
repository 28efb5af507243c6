"""Define the contenders of `step.py`: variants of a step that one module runs on the same weights, noise and batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from measuring import interleave, summary
from reference import ReferenceStep
from shapes import face_reward, reward_faces_everywhere, see_faces_everywhere
from torch import Tensor, nn

import frostline.models.wan.denoiser as denoiser_file
from frostline.models.faces import FaceIdentity
from frostline.models.wan.components import WanComponents
from frostline.rewards.active import RewardStages
from frostline.runtime.backends import TORCH
from frostline.runtime.stage import Tensors
from frostline.stages.wan.vae_encoder import VaeEncoderStage
from frostline.train import WanTrainingModule
from frostline.train.step_settings import DecodeSettings

# With this suffix, Conv3d of `reference` and `eager` uses oneDNN at every batch size on a CPU; without it, torch
# selects the implementation.
ONEDNN = "_onednn"
CONTENDERS: Mapping[str, str] = {
    "reference": "reference implementation, torch's own Conv3d",
    "reference_onednn": "reference implementation, Conv3d in oneDNN",
    "eager": "eager PyTorch, batched, torch's own Conv3d",
    "eager_onednn": "eager PyTorch, batched, Conv3d in oneDNN",
    "compile": "eager PyTorch, batched, Conv3d in oneDNN, torch.compile",
    "uncached": "frostline, uncached",
    "cached": "frostline, cached",
    "live_only": "live part only",
    "cached_window": "frostline, cached, gradient through the last latent frame only",
}
# Contenders whose loss is defined differently, so that it is not compared.
OTHER_LOSS = ("cached_window",)
_REFERENCES = ("reference", "reference_onednn")
_EAGER = ("eager", "eager_onednn", "compile")


@dataclass(frozen=True)
class Outcome:
    """The results of a step; `gradient` is the flat gradient of the LoRA weights, (P,) fp64."""

    loss: float
    face_score: float
    kl_loss: float
    gradient: Tensor


@dataclass(frozen=True)
class Tolerance:
    """The tolerance for equal outcomes: maximum absolute difference of the loss, minimum cosine of the gradients."""

    loss: float
    cosine: float


class Contenders:
    """Run steps of `module` on `batch` as any contender.

    Args:
        module: the module with the weights of all contenders.
        plain_vae: a copy of the module's VAE without oneDNN convolutions; see `plain_copy`.
        batch: the prompts and videos of the step.
        faces_everywhere: whether every frame counts as a face; see `see_faces_everywhere`.
        compiles: whether the contender `compile` will run; compiling its embedder takes a minute.
    """

    def __init__(
        self,
        module: WanTrainingModule,
        plain_vae: Any,
        batch: Mapping[str, Any],
        faces_everywhere: bool = False,
        compiles: bool = True,
    ) -> None:
        self.module = module
        self.batch = batch
        self.vaes = {False: plain_vae, True: module.components.vae}
        self._references = {name: ReferenceStep(module, self._vae(name)) for name in _REFERENCES}
        if faces_everywhere:
            reward_faces_everywhere(module)
            for reference in self._references.values():
                see_faces_everywhere(reference.faces)
        self._cache = module.conditioner.cache
        self._compiled_block = torch.compile(denoiser_file._block)
        with torch.no_grad():
            self._conditioning = module.forward_preprocess(batch)
        self._compiled_embedder = self._faster_embedder() if compiles else self._embedder
        self._frozen: list[dict[str, Tensor]] = []

    @property
    def _embedder(self) -> Any:
        return face_reward(self.module).faces.embedder

    @property
    def compiled(self) -> list[str]:
        """Return the parts that the contender `compile` compiles."""
        return ["denoiser blocks", *(["face embedder"] if self._compiled_embedder is not self._embedder else [])]

    def step(self, contender: str) -> tuple[float, float, float]:
        """Run forward and backward; return loss, face score and KL loss. Gradients accumulate in the LoRA weights."""
        if contender in self._references:
            return self._references[contender](self.batch)
        with self._playing(contender):
            conditioning = self._conditioning if contender == "live_only" else None
            loss, face_score, kl_loss = self.module(self.batch, conditioning)
            with self.module.runtime.clock.measure("backward", TORCH):
                loss.backward()
        return loss.item(), face_score.item(), kl_loss.item()

    def outcome(self, contender: str) -> Outcome:
        """Return the results of one step. The gradients are zeroed before and after it."""
        self.module.zero_grad()
        figures = self.step(contender)
        gradient = flat_gradient(self.module)
        self.module.zero_grad()
        return Outcome(*figures, gradient)

    def rounding_noise(self, contender: str, tries: int = 3) -> Tolerance:
        """Return twice the largest change of the outcome when the LoRA weights change by up to one ulp.

        One ulp is the machine epsilon of the model's dtype. Another order of operations causes changes of this size.
        The tolerance of the loss is at least one ulp.

        Args:
            contender: the contender to run.
            tries: the number of random changes of the weights.
        """
        plain, parameters = self.outcome(contender), [*self.module.trainable_parameters().values()]
        before = [parameter.detach().clone() for parameter in parameters]
        unit = torch.finfo(self._references["reference"].dtype).eps
        generator = torch.Generator(before[0].device).manual_seed(0)
        moved: dict[str, Outcome] = {}
        with torch.no_grad():
            for index in range(tries):
                for parameter, value in zip(parameters, before, strict=True):
                    change = torch.empty_like(value).uniform_(-unit, unit, generator=generator)
                    parameter.copy_(value * (1 + change))
                with torch.enable_grad():
                    moved[str(index)] = self.outcome(contender)
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        losses = [abs(each.loss - plain.loss) for each in moved.values()]
        cosines = [_cosine(each.gradient, plain.gradient) for each in moved.values()]
        return Tolerance(loss=max(unit, 2 * max(losses)), cosine=1 - 2 * (1 - min(cosines)))

    def timed_step(self, contender: str, stages: list[dict[str, float]]) -> Callable[[], None]:
        """Return a function that runs one step and appends the milliseconds of each stage to `stages`."""
        module = self.module

        def step() -> None:
            module.zero_grad()
            with module.runtime.clock.collect() as times:
                self.step(contender)
            stages.append({stage: span.milliseconds for stage, span in times.read().items()})

        return step

    def record_frozen(self) -> None:
        """Record the outputs of all frozen stages in one step, which `live_only` replays at no cost."""
        run = self.module.runtime.run
        self._frozen = []

        def recording(stage: str, inputs: Mapping[str, Tensor], **how: Any) -> dict[str, Tensor]:
            outputs = run(stage, inputs, **how)
            self._frozen.append(outputs)
            return outputs

        with _replaced(self.module.runtime, "run", recording):
            self.module(self.batch, self._conditioning)

    def _faster_embedder(self) -> Any:
        """Return the faster of the compiled and the eager live embedder, which is what a user would choose."""
        embedder = self._embedder
        frames = self.batch["video"].shape[0] * self.batch["video"].shape[1]
        device = self._conditioning.device
        faces = torch.zeros(frames, 3, embedder.image_size, embedder.image_size, device=device, requires_grad=True)
        candidates = {"eager": embedder, "compiled": torch.compile(embedder)}
        calls = {name: partial(_forward_and_backward, run, faces) for name, run in candidates.items()}
        medians = {name: row["median_ms"] for name, row in summary(interleave(calls, 3, device)).items()}
        return min(candidates.items(), key=lambda named: medians[named[0]])[1]

    def _identity(self, made: Callable[[RewardStages], FaceIdentity], run: RewardStages) -> FaceIdentity:
        """Create the face comparison with the compiled embedder."""
        faces = made(run)
        faces.embedder = self._compiled_embedder
        return faces

    def _vae(self, contender: str) -> Any:
        return self.vaes[contender.endswith(ONEDNN) or contender == "compile"]

    @contextmanager
    def _playing(self, contender: str) -> Iterator[None]:
        """Configure the module as `contender` within the block."""
        module = self.module
        cache = self._cache if contender in ("cached", "cached_window", "live_only") else None
        with ExitStack() as stack:
            stack.enter_context(_replaced(module.conditioner, "cache", cache))
            if contender in _EAGER:
                stack.enter_context(module.runtime.use(**dict.fromkeys(module.stages, TORCH)))
                stack.enter_context(self._vae_of(contender))
                stack.enter_context(_replaced(module.trained_experts[-1].module, "run_block", denoiser_file._block))
            if contender == "compile":
                stack.enter_context(_replaced(module.trained_experts[-1].module, "run_block", self._compiled_block))
                reward = face_reward(module)
                stack.enter_context(_replaced(reward, "identity", partial(self._identity, reward.identity)))
            if contender == "cached_window":
                window = DecodeSettings(num_latent_frames=1, position="last")
                stack.enter_context(
                    _replaced(module, "settings", module.settings.model_copy(update={"decode": window}))
                )
            if contender == "live_only":
                stack.enter_context(_replaced(module.runtime, "run", self._replay()))
            yield

    @contextmanager
    def _vae_of(self, contender: str) -> Iterator[None]:
        """Use diffsynth's own `encode` and `decode` within the block, instead of frostline's."""
        vae, module = self._vae(contender), self.module

        def decode(latents: Tensor) -> Tensor:
            video = vae.model.decode(latents, vae.scale).clamp(-1, 1)
            vae.model.clear_cache()
            return video

        stages, decoder = module.runtime.stages, replace(module.model.decoder(), whole=decode)
        planned = stages["vae_encoder"]
        # Changed in place, because the runtime uses this mapping.
        stages["vae_encoder"] = _PlainEncoder(**{**vars(planned), "vae": vae})
        try:
            with _replaced(module.model, "decoder", lambda: decoder):
                yield
        finally:
            stages["vae_encoder"] = planned

    def _replay(self) -> Callable[..., dict[str, Tensor]]:
        answers = iter(self._frozen)
        return lambda stage, inputs, **how: next(answers)


class _PlainEncoder(VaeEncoderStage):
    """The VAE encoder with diffsynth's own `encode`; the convolutions are those of `vae`."""

    def torch(self, inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        latents = self.vae.model.encode(inputs["video"], self.vae.scale)
        self.vae.model.clear_cache()
        return {"latents": latents}


def _forward_and_backward(embedder: Callable[[Tensor], Tensor], faces: Tensor) -> None:
    torch.autograd.grad(embedder(faces).sum(), faces)


def plain_copy(components: WanComponents) -> Any:
    """Return a copy of the VAE. Call this before a module changes the convolutions of the original to oneDNN."""
    vae: nn.Module = components.vae
    return copy.deepcopy(vae)


def flat_gradient(module: WanTrainingModule) -> Tensor:
    """Return the flat gradient of the LoRA weights, (P,) fp64."""
    return torch.cat([p.grad.flatten() for p in module.trainable_parameters().values() if p.grad is not None]).double()


def compare(outcomes: Mapping[str, Outcome], base: str, tolerance: Tolerance) -> dict[str, Any]:
    """Compare loss and gradient of each contender with those of `base`; `same` is True within the tolerance."""
    wanted = outcomes[base]
    checks = {}
    for name, outcome in outcomes.items():
        cosine = _cosine(outcome.gradient, wanted.gradient)
        checks[name] = {
            "loss": outcome.loss,
            "face_score": outcome.face_score,
            "kl_loss": outcome.kl_loss,
            "gradient_cosine": cosine,
            "gradient_norm_ratio": (outcome.gradient.norm() / wanted.gradient.norm()).item(),
            "same": abs(outcome.loss - wanted.loss) <= tolerance.loss and cosine >= tolerance.cosine,
        }
    return checks


def _cosine(a: Tensor, b: Tensor) -> float:
    return nn.functional.cosine_similarity(a, b, dim=0).item()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    own = name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
