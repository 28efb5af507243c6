"""Changes of a module between two steps, with calls of PEFT and PyTorch: engines use them, or are not used."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from steps import QUICK, small_clips
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from frostline.errors import EngineError
from frostline.models.lora.inject import ADAPTER, lora_layers
from frostline.stages.denoiser import REFERENCE
from frostline.train import WanTrainingModule
from frostline.train.step.rollout import TailOptions

MakeModule = Callable[..., WanTrainingModule]
Change = Callable[[nn.Module], None]
ORT = "onnxruntime"


def new_matrices(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    named = {name: value for name, value in model.state_dict().items() if f".{ADAPTER}." in name}
    return {name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in named.items()}


def set_peft_state(model: nn.Module) -> None:
    state = {name.replace(f".{ADAPTER}", ""): value for name, value in new_matrices(model).items()}
    peft.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)


def assign_state(model: nn.Module) -> None:
    model.load_state_dict(new_matrices(model), strict=False, assign=True)


def disable(model: nn.Module) -> None:
    for layer in lora_layers(model):
        layer.enable_adapters(False)


def double_the_scale(model: nn.Module) -> None:
    for layer in lora_layers(model):
        layer.scaling[ADAPTER] *= 2


def double_one_scale(model: nn.Module) -> None:
    lora_layers(model)[3].scaling[ADAPTER] *= 2


def disable_one(model: nn.Module) -> None:
    lora_layers(model)[3].enable_adapters(False)


def merge(model: nn.Module) -> None:
    for layer in lora_layers(model):
        layer.merge()


def merge_and_reset(model: nn.Module) -> None:
    for layer in lora_layers(model):
        layer.merge()
        layer.merged_adapters.clear()
        layer.reset_lora_parameters(ADAPTER, True)


def activate_another(model: nn.Module) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q", "o"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, adapter_name="other")
    for layer in lora_layers(model):
        layer.set_adapter("other")


def replace_the_adapter(model: nn.Module) -> None:
    """Replace the adapter by one with the same name and another rank."""
    for layer in lora_layers(model):
        layer.delete_adapter(ADAPTER)
    targets = ["q", "k", "v", "o", "ffn.0", "ffn.2"]
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def scale_the_weights(model: nn.Module) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        block.ffn[0].base_layer.weight.data = 1.5 * block.ffn[0].base_layer.weight.data


FOLLOWED = [set_peft_state, assign_state, disable, double_the_scale, replace_the_adapter]
LEFT_TO_TORCH = [double_one_scale, disable_one, merge, merge_and_reset, activate_another, scale_the_weights]


class Velocities:
    """The velocities that a step computes for one input with the backend of the plan: policy and KL reference."""

    def __init__(self, module: WanTrainingModule) -> None:
        self.module = module
        self.conditioning = module.forward_preprocess(small_clips(1))
        self.latents = module.noise(self.conditioning)

    def __call__(self, lora: bool) -> tuple[Tensor, str]:
        given, variant = self.conditioning.conditions, None if lora else REFERENCE
        with torch.no_grad(), self.module.runtime.clock.collect() as times:
            velocity = self.module.parts.sampler._frozen_velocity(self.latents, 1, given, variant)
        return velocity, times.read()["denoiser"].backend

    @torch.no_grad()
    def live(self) -> Tensor:
        """Return the velocity of the policy, computed like in the denoise tail."""
        given = self.conditioning.conditions
        sampler, (expert,) = self.module.parts.sampler, self.module.trained_experts
        options = TailOptions(engine_forward=False)
        return sampler._live_velocity(self.latents, expert, float(sampler.schedule.sigmas[1]), given, options)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("frostline")]


@pytest.mark.parametrize("change", [*FOLLOWED, *LEFT_TO_TORCH], ids=lambda change: change.__name__)
def test_rollout_and_kl_reference_are_those_of_the_module_as_it_is(
    change: Change, make_module: MakeModule, engines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hybrid = make_module(plan={"denoiser": ORT, "*": "torch"}, engines=engines, strict=False, **QUICK)
    in_torch = make_module(**QUICK)
    ours, theirs = Velocities(hybrid), Velocities(in_torch)
    before, backend = ours(lora=True)
    assert backend == ORT
    for module in (hybrid, in_torch):
        torch.manual_seed(0)
        change(module.components.denoiser)
    expected = theirs.live()
    if change not in (merge, merge_and_reset):  # these do not change the policy
        assert (expected - before).norm() > 1e-3 * before.norm(), "nothing was changed"
    policy, backend = ours(lora=True)
    torch.testing.assert_close(policy, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.live(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours(lora=False)[0], theirs(lora=False)[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(ours(lora=True)[0], expected, atol=2e-5, rtol=0)
    assert backend == (ORT if change in FOLLOWED else "torch")
    assert len({message.partition(":")[2][:20] for message in warnings(caplog)}) == (change in LEFT_TO_TORCH)


@pytest.mark.parametrize("change", LEFT_TO_TORCH, ids=lambda change: change.__name__)
def test_strict_raises_instead(change: Change, make_module: MakeModule, engines: Path) -> None:
    velocities = Velocities(make_module(plan={"denoiser": ORT, "*": "torch"}, engines=engines, **QUICK))
    velocities(lora=True)
    change(velocities.module.components.denoiser)
    with pytest.raises(EngineError, match="stage denoiser: "):
        velocities(lora=True)


def test_the_kl_reference_leaves_the_switches_alone(make_module: MakeModule) -> None:
    """Do not enable a disabled layer or make a frozen matrix trainable."""
    module = make_module(**QUICK)
    layers = lora_layers(module.components.denoiser)
    disable(module.components.denoiser)
    module.parts.sampler.runtime["denoiser"](**module.stages["denoiser"].cases()["sample"].inputs)
    Velocities(module)(lora=False)
    assert all(layer.disable_adapters for layer in layers)
    assert not any(parameter.requires_grad for parameter in module.trainable_parameters().values())


@pytest.mark.parametrize("plan", ["torch", ORT])
def test_a_copy_of_a_module_owns_its_weights(plan: str, make_module: MakeModule, engines: Path) -> None:
    module = make_module(plan=plan, engines=engines, **QUICK)
    data = small_clips(1)
    before = module(data)
    copied = copy.deepcopy(module)
    names = {name: value.data_ptr() for name, value in module.state_dict().items()}
    assert all(value.data_ptr() != names[name] for name, value in copied.state_dict().items() if value.numel())
    with torch.no_grad():
        for parameter in module.trainable_parameters().values():
            parameter.mul_(3)
        module.components.vae.model.conv2.weight.mul_(1.5)
    for one, other in zip(copied(data), before, strict=True):
        assert torch.equal(one, other), "the copy computes with the original's weights"
    assert module(data)[2].item() > 2 * before[2].item()
    optimizer = torch.optim.AdamW(copied.trainable_parameters().values(), lr=1e-2)
    copied(data)[0].backward()
    optimizer.step()
    velocities = Velocities(copied)
    torch.testing.assert_close(velocities(lora=True)[0], velocities.live(), atol=2e-5, rtol=0)
    assert (velocities.live() - Velocities(make_module(**QUICK)).live()).norm() > 1e-3


def test_an_averaged_model_validates_with_its_average(make_module: MakeModule, engines: Path) -> None:
    module = make_module(plan={"denoiser": ORT, "*": "torch"}, engines=engines, **QUICK)
    averaged = AveragedModel(module)
    for factor in (1.0, 3.0):
        with torch.no_grad():
            for parameter in module.trainable_parameters().values():
                parameter.mul_(factor)
        averaged.update_parameters(module)
    mean = make_module(**QUICK)
    with torch.no_grad():
        for parameter in mean.trainable_parameters().values():
            parameter.mul_(2)
    velocity, backend = Velocities(averaged.module)(lora=True)
    assert backend == ORT
    torch.testing.assert_close(velocity, Velocities(mean).live(), atol=2e-5, rtol=0)


def test_a_module_that_is_pickled_says_what_to_do(make_module: MakeModule, tmp_path: Path) -> None:
    module, saying = make_module(**QUICK), r"cannot be pickled: save the adapter with `module\.save_adapter\(folder\)`"
    with pytest.raises(TypeError, match=saying):
        pickle.dumps(module)
    with pytest.raises(TypeError, match=saying):
        torch.save(module, tmp_path / "module.pt")
