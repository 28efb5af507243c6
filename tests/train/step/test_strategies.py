"""Strategies of backpropagation and experts of a LoRA, compared with a plain loop around diffsynth's own denoiser."""

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from diffsynth.pipelines.wan_video import model_fn_wan_video
from peft.tuners.tuners_utils import BaseTunerLayer
from steps import gradient
from torch import Tensor

from frostline.models.tiny.clips import held_out_clips
from frostline.train import WanTrainingModule

MakeModule = Callable[..., WanTrainingModule]
KL_WEIGHT = 0.3
REWARD = {"type": "own_rewards:Brightness", "weight": 1.0, "scale": 1.0}
SETTINGS: dict[str, Any] = {"kl_weight": KL_WEIGHT, "rewards": [REWARD], "grad_start_step": 4}


def sigma(i: int) -> float:
    u = 1 - i / 8
    return 5 * u / (1 + 4 * u)


def transcription(
    module: WanTrainingModule,
    data: dict[str, Any],
    live: Collection[int],
    *,
    end: int = 7,
    stop: bool = False,
    with_kl: Collection[int] | None = None,
    lv: int = 0,
    sft: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute loss and KL of one sample by the definition of the strategies, with diffsynth's denoiser and decoder."""
    parts = module.components
    conditioning = module.forward_preprocess(data)
    x, kl, high_noise = module.noise(conditioning), [], 3 if parts.denoiser_high_noise is not None else 0
    experts, behind_a_lora = module.settings.lora.experts, False

    def velocity(i: int, latents: Tensor) -> Tensor:
        dit = parts.denoiser_high_noise if i < high_noise else parts.denoiser
        return model_fn_wan_video(
            dit=dit, latents=latents, timestep=torch.tensor([1000 * sigma(i)]), **conditioning.conditions
        )

    def switch(on: bool) -> None:
        for layer in itertools.chain(
            parts.denoiser.modules(), *(m.modules() for m in [parts.denoiser_high_noise] if m)
        ):
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(on)
        for parameter in module.trainable_parameters().values():
            parameter.requires_grad_(True)

    def adapted(i: int) -> bool:
        return experts in ("high" if i < high_noise else "low", "both")

    for i in range(end + 1):
        behind_a_lora |= i in live and adapted(i)
        if i in live and (adapted(i) or (behind_a_lora and not stop)):
            v = velocity(i, x.detach() if stop else x)
            if adapted(i) and (with_kl is None or i in with_kl):
                switch(False)
                with torch.no_grad():
                    base = velocity(i, x)
                switch(True)
                kl.append((v - base).pow(2).mean() / (2 * sigma(i) ** 2))
        else:
            with torch.no_grad():
                v = velocity(i, x)
        x = x + (sigma(i + 1) - sigma(i)) * v
    clips = [x]
    for _ in range(lv):
        noised = (1 - sigma(7)) * x.detach() + sigma(7) * torch.randn(x.shape)
        clips.append(noised - sigma(7) * velocity(7, noised))
    videos = []
    for latents in clips:
        videos.append(parts.vae.model.decode(latents, parts.vae.scale).clamp(-1, 1))
        parts.vae.model.clear_cache()
    kl_loss = torch.stack(kl).sum() * sum(map(adapted, live)) / len(kl) / len(live)
    loss = -((torch.cat(videos) + 1) / 2).mean() + KL_WEIGHT * kl_loss
    if sft:
        clip = parts.vae.model.encode(data["video"].transpose(1, 2) * 2 - 1, parts.vae.scale)
        u = torch.rand((), dtype=torch.float64).item()
        level, noise = 5 * u / (1 + 4 * u), torch.randn(clip.shape)
        predicted = model_fn_wan_video(
            dit=parts.denoiser,
            latents=(1 - level) * clip + level * noise,
            timestep=torch.tensor([1000 * level]),
            **conditioning.conditions,
        )
        loss = loss + sft * (predicted - (noise - clip)).pow(2).mean()
    return loss, kl_loss


def assert_same(module: WanTrainingModule, data: dict[str, Any], live: Collection[int], **how: Any) -> None:
    seed = torch.get_rng_state()
    loss, _, kl_loss = module(data)
    loss.backward()
    own = gradient(module)
    torch.set_rng_state(seed)
    expected, expected_kl = transcription(module, data, live, **how)
    expected.backward()
    theirs = gradient(module)
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(kl_loss, expected_kl.detach(), atol=1e-5, rtol=0)
    assert torch.nn.functional.cosine_similarity(own, theirs, dim=0) >= 0.99999
    assert (own.norm() / theirs.norm() - 1).abs() <= 1e-4


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    clips = held_out_clips(1, seed=5, num_frames=5, size=32)
    return {"prompt": clips.prompts, "video": clips.video}


CASES: dict[str, tuple[dict[str, Any], Collection[int], dict[str, Any]]] = {
    "tail": ({}, range(4, 8), {}),
    "tail that ends early": ({"grad_end_step": 5}, range(4, 6), {"end": 5}),
    "last": ({"backprop": {"strategy": "last"}}, [7], {}),
    "steps with frozen ones between": ({"backprop": {"strategy": "steps", "steps": [4, 6]}}, [4, 6], {}),
    "the last step on fresh noise": ({"backprop": {"strategy": "last", "lv_samples": 2}}, [7], {"lv": 2}),
    "the data's clip": ({"sft_weight": 0.5}, range(4, 8), {"sft": 0.5}),
    "without the gradient of latents": ({"backprop": {"stop_latent_gradient": True}}, range(4, 8), {"stop": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_a_plain_loop(case: str, make_module: MakeModule, data: dict[str, Any]) -> None:
    settings, live, how = CASES[case]
    assert_same(make_module(**SETTINGS | settings), data, live, **how)


def test_live_steps_of_the_frozen_expert_count_as_zero(make_module: MakeModule, data: dict[str, Any]) -> None:
    assert_same(make_module("tiny-moe", **SETTINGS | {"grad_start_step": 1}), data, range(1, 8))


def of_experts(experts: str, **settings: Any) -> dict[str, Any]:
    return {"lora": {"rank": 8, "experts": experts}, "grad_start_step": 1, **settings}


# Cases of tiny-moe, whose high-noise expert computes the first three steps.
OF_EXPERTS: dict[str, tuple[dict[str, Any], Collection[int], dict[str, Any]]] = {
    "high": (of_experts("high", backprop={"strategy": "steps", "steps": [1, 2]}), [1, 2], {}),
    "high, through the low-noise expert": (of_experts("high"), range(1, 8), {}),
    "high, past it": (of_experts("high", backprop={"stop_latent_gradient": True}), range(1, 8), {"stop": True}),
    "both": (of_experts("both"), range(1, 8), {}),
    "both from the first step to an early end": (
        of_experts("both", grad_start_step=0, grad_end_step=4),
        range(5),
        {"end": 4},
    ),
    "both, each step for itself": (
        of_experts("both", backprop={"stop_latent_gradient": True}),
        range(1, 8),
        {"stop": True},
    ),
    "both with frozen steps between": (
        of_experts("both", backprop={"strategy": "steps", "steps": [1, 4, 6]}),
        [1, 4, 6],
        {},
    ),
}


@pytest.mark.parametrize("case", OF_EXPERTS)
def test_loss_and_gradient_of_experts_are_those_of_a_plain_loop(
    case: str, make_module: MakeModule, data: dict[str, Any]
) -> None:
    settings, live, how = OF_EXPERTS[case]
    assert_same(make_module("tiny-moe", **SETTINGS | settings), data, live, **how)


def test_latents_of_a_trained_expert_are_not_recalled_after_an_update(
    make_module: MakeModule, data: dict[str, Any]
) -> None:
    """With fixed noise, compare each step with the same step without a cache."""
    settings = SETTINGS | of_experts("both", grad_start_step=2) | {"noise_seed": 7}
    modules = [make_module("tiny-moe", **settings, **cache) for cache in ({}, {"cache_bytes": 0})]
    assert modules[0].parts.cache is not None
    assert modules[1].parts.cache is None
    losses = []
    for _ in range(2):
        steps = []
        for module in modules:
            loss, *_ = module(data)
            loss.backward()
            steps.append((loss.detach(), gradient(module)))
            with torch.no_grad():
                for name, matrix in module.trainable_parameters().items():
                    if name.startswith("high_noise."):
                        matrix.add_(0.05)
        torch.testing.assert_close(steps[0], steps[1], atol=1e-7, rtol=1e-6)
        losses.append(steps[0][0].item())
    assert abs(losses[1] - losses[0]) > 1e-4


@pytest.mark.parametrize("kind", ["block", "full"])
def test_recomputation_changes_nothing_across_the_boundary(
    kind: str, make_module: MakeModule, data: dict[str, Any]
) -> None:
    module = make_module("tiny-moe", **SETTINGS | of_experts("both"), gradient_checkpointing=kind)
    assert_same(module, data, range(1, 8))


def test_an_expert_that_no_drawn_step_uses_has_a_gradient_of_zero(
    make_module: MakeModule, data: dict[str, Any]
) -> None:
    """Give zeros instead of None, so that processes that drew other steps can average the gradient."""
    settings = SETTINGS | of_experts("both", backprop={"strategy": "random", "num_steps": 1})
    module = make_module("tiny-moe", **settings)
    moved = set()
    for seed in range(6):
        torch.manual_seed(seed)
        module(data)[0].backward()
        gradients = {name: parameter.grad for name, parameter in module.trainable_parameters().items()}
        assert all(gradient is not None for gradient in gradients.values())
        now = {name.split(".")[0] for name, gradient in gradients.items() if gradient is not None and gradient.any()}
        assert len(now) == 1
        moved |= now
        module.zero_grad()
    assert moved == {"high_noise", "low_noise"}


@pytest.mark.parametrize("strategy", ["random", "uniform"])
def test_drawn_steps(strategy: str, make_module: MakeModule, data: dict[str, Any]) -> None:
    module = make_module(**SETTINGS | {"backprop": {"strategy": strategy, "num_steps": 2}, "grad_start_step": 2})
    torch.manual_seed(11)
    before = torch.get_rng_state()
    live = module.parts.steps.draw()
    torch.set_rng_state(before)
    assert_same(module, data, live)
    assert module.last_metrics is not None
    assert tuple(module.last_metrics.kl) == live


def test_some_of_the_kl_terms_stand_for_all(make_module: MakeModule, data: dict[str, Any]) -> None:
    """The mean of the estimate over draws is that of all terms; each draw equals a plain loop with the drawn terms."""
    whole = make_module(**SETTINGS)
    expected = whole(data)[2].item()
    assert whole.last_metrics is not None
    terms = whole.last_metrics.kl
    module = make_module(**SETTINGS | {"backprop": {"kl_steps": "random:2"}})
    torch.manual_seed(3)
    seen = set()
    for _ in range(6):
        kl_loss = module(data)[2].item()
        assert module.last_metrics is not None
        drawn = module.last_metrics.kl
        assert len(drawn) == 2
        assert drawn == pytest.approx({step: terms[step] for step in drawn}, rel=1e-4)
        assert kl_loss == pytest.approx(sum(drawn.values()) / 2, rel=1e-5)
        seen |= {*drawn}
    assert seen == {4, 5, 6, 7}
    assert expected == pytest.approx(sum(terms.values()) / 4, rel=1e-5)
    torch.manual_seed(3)
    module(data)
    assert module.last_metrics is not None
    torch.manual_seed(3)
    assert_same(module, data, range(4, 8), with_kl={*module.last_metrics.kl})


class Recorded:
    """Keep values without a gradient constant: velocities of frozen steps and of the base model, detached latents."""

    def __init__(self, sampler: Any, stop: bool) -> None:
        self.sampler, self.stop, self.values = sampler, stop, dict[str, Tensor]()
        self.frozen, self.live = sampler._frozen_velocity, sampler._live_velocity
        self.base = sampler._base_velocities
        sampler._frozen_velocity, sampler._live_velocity = self.frozen_velocity, self.live_velocity
        sampler._base_velocities = self.base_velocities
        self.bases: list[Tensor] = []
        self.again, sampler._again = sampler._again, self.on_recorded_clips

    def frozen_velocity(self, latents: Tensor, index: int, given: Any, variant: str | None = None) -> Tensor:
        if variant is not None:
            return self.frozen(latents, index, given, variant)
        return self.values.setdefault(f"velocity {index}", self.frozen(latents, index, given))

    def base_velocities(self, *arguments: Any) -> list[Tensor]:
        self.bases = self.bases or [*self.base(*arguments)]
        return self.bases

    def live_velocity(self, latents: Tensor, expert: Any, sigma: float, *rest: Any) -> Tensor:
        seen = self.values.setdefault(f"latents {sigma}", latents) if self.stop else latents
        return self.live(seen, expert, sigma, *rest)

    def on_recorded_clips(self, clips: Tensor, *rest: Any) -> Any:
        return self.again(self.values.setdefault("clips", clips), *rest)


DRAWN: dict[str, tuple[dict[str, Any], Collection[int], dict[str, Any]]] = {
    strategy: ({"backprop": {"strategy": strategy, "num_steps": 2}, "grad_start_step": 2}, [], {})
    for strategy in ("random", "uniform")
}


@pytest.mark.parametrize("case", [*CASES, *DRAWN, "both", "high, through the low-noise expert"])
def test_the_gradient_is_that_of_finite_differences(
    case: str, make_module: MakeModule, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare along the gradient, in fp64."""
    settings, _, how = {**CASES, **DRAWN, **OF_EXPERTS}[case]
    model = "tiny-moe" if case in OF_EXPERTS else "tiny"
    module = make_module(model, **SETTINGS | settings, plan="torch", cache_bytes=0)
    # A step converts velocities, frames and scores with `float()`, whatever the dtype of the networks.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    for part in module.model.modules():
        part.double()
    vae = module.components.vae
    vae.scale = [part.double() for part in vae.scale]
    Recorded(module.parts.sampler, stop=how.get("stop", False))

    def drawn_loss() -> Tensor:
        torch.manual_seed(0)
        return module(data)[0]

    loss = drawn_loss()
    loss.backward()
    direction = gradient(module)
    step = 1e-3 / direction.norm()
    losses = []
    for change in (step, -2 * step):
        start = 0
        with torch.no_grad():
            for parameter in module.trainable_parameters().values():
                parameter += change * direction[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
            losses.append(drawn_loss().item())
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope.item() / direction.norm().square().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"backprop": {"strategy": "steps", "steps": [4, 6]}},
        {"backprop": {"strategy": "random", "num_steps": 2, "kl_steps": "random:1"}},
        {"backprop": {"strategy": "uniform", "num_steps": 2, "stop_latent_gradient": True}},
        {"backprop": {"strategy": "last", "lv_samples": 1}, "sft_weight": 0.5},
        {"decode": {"num_latent_frames": 1, "position": "last"}, "rollout": {"policy": "base"}},
    ],
    ids=[
        "frozen steps between",
        "random",
        "uniform",
        "fresh noise and the data's clip",
        "a window behind the base's rollout",
    ],
)
def test_hybrid_is_torch(changes: dict[str, Any], make_module: MakeModule, engines: Path, data: dict[str, Any]) -> None:
    assert_hybrid_is_torch("tiny", SETTINGS | changes, make_module, engines, data)


@pytest.mark.parametrize("case", ["high", "high, through the low-noise expert", "both"])
def test_hybrid_is_torch_with_a_lora_on_other_experts(
    case: str, make_module: MakeModule, expert_engines: Path, data: dict[str, Any]
) -> None:
    """Use engines of all denoisers: frozen steps, KL references, and with `full` the first forward of live steps."""
    settings = SETTINGS | OF_EXPERTS[case][0] | {"gradient_checkpointing": "full"}
    assert_hybrid_is_torch("tiny-moe", settings, make_module, expert_engines, data)


def assert_hybrid_is_torch(
    model: str, settings: dict[str, Any], make_module: MakeModule, engines: Path, data: dict[str, Any]
) -> None:
    results = []
    for plan in ("torch", "onnxruntime"):
        module = make_module(model, plan=plan, engines=engines, **settings)
        torch.manual_seed(0)
        loss = module(data)[0]
        loss.backward()
        results.append((loss.detach(), gradient(module)))
    (loss, own), (other_loss, other) = results
    torch.testing.assert_close(loss, other_loss, atol=1e-5, rtol=0)
    assert torch.nn.functional.cosine_similarity(own, other, dim=0) >= 0.99999
