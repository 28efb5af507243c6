"""LoRA with PEFT: how injecting, switching, scaling, saving and loading change the denoiser's output."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.checkpoints.loading import load_components
from frostline.models.lora.inject import (
    LoraSwitches,
    active_scale,
    adapters_off,
    inject_lora,
    live_scale,
    load_adapter,
    lora_layers,
    lora_parameters,
    lora_scale,
    save_adapter,
)
from frostline.models.wan.denoiser import Denoiser

LAYERS = 4 * 10  # blocks times q, k, v, o of two attentions and two of the feed-forward


def tiny_denoiser(dtype: torch.dtype = torch.float32) -> Any:
    return load_components("tiny", dtype).denoiser


def adapted(rank: int = 8, alpha: float | None = None, seed: int = 0) -> tuple[Any, LoraConfig]:
    """Return a denoiser with an adapter that changes its output, and the config."""
    model = tiny_denoiser()
    config = inject_lora(model, rank, alpha)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, config


@torch.no_grad()
def output(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.patch_embedding.weight.dtype)

    latents, context, y = noise(2, 16, 2, 4, 6), noise(2, 16, 64), noise(2, 20, 2, 4, 6)
    return Denoiser(model)(latents, torch.tensor([900.0, 300.0]), context, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_injection_changes_no_output(dtype: torch.dtype) -> None:
    model = tiny_denoiser(dtype)
    before = output(model)
    inject_lora(model, 8)
    assert len(lora_layers(model)) == LAYERS
    assert torch.equal(output(model), before)


def test_only_the_adapter_is_trainable_and_fp32() -> None:
    model = tiny_denoiser(torch.bfloat16)
    inject_lora(model, 4)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == lora_parameters(model).keys()
    assert len(trainable) == 2 * LAYERS
    assert {parameter.dtype for parameter in lora_parameters(model).values()} == {torch.float32}
    assert {p.shape[0] for name, p in lora_parameters(model).items() if "lora_A" in name} == {4}


def test_adapters_off_is_the_base_bit_for_bit() -> None:
    base = output(tiny_denoiser())
    model, _ = adapted()
    on = output(model)
    assert (on - base).abs().max() > 1e-2
    with adapters_off(model):
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), on)
    assert all(parameter.requires_grad for parameter in lora_parameters(model).values())


def test_adapters_come_back_after_an_error() -> None:
    model, _ = adapted()
    on = output(model)
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), live_scale(model, torch.zeros(())):
        raise ZeroDivisionError
    assert torch.equal(output(model), on)


def test_twice_the_scale_is_twice_the_delta() -> None:
    model, _ = adapted()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    layers = [layer for layer in lora_layers(model) if layer.in_features == 128]
    assert len(layers) == LAYERS - 4
    with torch.no_grad():
        bases = [layer.get_base_layer()(x) for layer in layers]
        once = [layer(x) - base for layer, base in zip(layers, bases, strict=True)]
        with live_scale(model, torch.tensor(2.0)):
            twice = [layer(x) - base for layer, base in zip(layers, bases, strict=True)]
        after = [layer(x) - base for layer, base in zip(layers, bases, strict=True)]
    for one, two, again in zip(once, twice, after, strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(two, 2 * one, atol=1e-5, rtol=0)
        assert torch.equal(again, one)
    assert lora_scale(model) == 1.0


def test_others_see_through_a_lora_that_is_off_for_a_call() -> None:
    """Read the scale of the policy for an engine in another thread while PyTorch computes the KL reference."""
    model, _ = adapted(rank=4, alpha=8)
    switches = LoraSwitches(model)
    with adapters_off(model):
        assert all(layer.disable_adapters for layer in lora_layers(model))
        assert (active_scale(model), switches.conflict()) == (2.0, None)
        with adapters_off(model):
            assert active_scale(model) == 2.0
        assert active_scale(model) == 2.0
    for layer in lora_layers(model):
        layer.enable_adapters(False)
    with adapters_off(model):
        assert active_scale(model) == 0
    assert [layer.disable_adapters for layer in lora_layers(model)] == [True] * len(lora_layers(model))
    lora_layers(model)[1].enable_adapters(True)
    with adapters_off(model):
        assert switches.conflict() == "some LoRA layers are disabled, others are not"


def test_a_live_scale_is_the_scale_of_another_alpha() -> None:
    """Compare outputs of the whole network: with alpha = 2 rank, and with a live scale of 2."""
    model, other = adapted(rank=4)[0], adapted(rank=4, alpha=8)[0]
    assert (lora_scale(model), lora_scale(other)) == (1.0, 2.0)
    with live_scale(model, torch.tensor(2.0)):
        doubled = output(model)
    assert (doubled - output(model)).abs().max() > 1e-2
    torch.testing.assert_close(doubled, output(other), atol=1e-6, rtol=0)
    with live_scale(model, torch.zeros(())):
        torch.testing.assert_close(output(model), output(tiny_denoiser()), atol=1e-6, rtol=0)


def test_one_scale_for_all_layers_is_needed() -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        lora_scale(tiny_denoiser())
    model, _ = adapted()
    lora_layers(model)[0].scaling["default"] = 3.0
    with pytest.raises(ConfigError, match=r"1\.0, 3\.0"):
        lora_scale(model)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model, config = adapted(rank=4, alpha=6)
    save_adapter(model, config, tmp_path / "new" / "adapter")
    assert {path.name for path in (tmp_path / "new" / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    fresh = tiny_denoiser()
    loaded = load_adapter(fresh, tmp_path / "new" / "adapter")
    assert (loaded.r, loaded.lora_alpha, loaded.target_modules) == (4, 6, config.target_modules)
    assert torch.equal(output(fresh), output(model))
    assert all(parameter.requires_grad for parameter in lora_parameters(fresh).values())


def test_plain_peft_loads_it(tmp_path: Path) -> None:
    model, config = adapted(rank=4, alpha=6)
    save_adapter(model, config, tmp_path)
    fresh = tiny_denoiser()
    base = output(fresh)
    peft = PeftModel.from_pretrained(fresh, str(tmp_path))
    assert torch.equal(output(peft.get_base_model()), output(model))
    with peft.disable_adapter():
        assert torch.equal(output(peft.get_base_model()), base)


def test_loads_what_plain_peft_saved(tmp_path: Path) -> None:
    peft = PeftModel(tiny_denoiser(), LoraConfig(r=4, lora_alpha=6, target_modules=["q", "ffn.2"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora_parameters(peft).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(str(tmp_path))
    fresh = tiny_denoiser()
    load_adapter(fresh, tmp_path)
    assert torch.equal(output(fresh), output(peft.get_base_model()))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, config = adapted(rank=4)
    save_adapter(model, config, tmp_path)
    return tmp_path


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "config is no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "config of another method": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3", "target_modules": ["q"]}'),
        "adapter_config.json",
    ),
    "rank-stabilised": (lambda folder: _change_config(folder, use_rslora=True), "adapter_config.json"),
    "a rank of its own that it has not": (
        lambda folder: _change_config(folder, rank_pattern={"q": 9}),
        "adapter_config.json states 9",
    ),
    "quantised as it began": (lambda folder: _change_config(folder, init_lora_weights="loftq"), "merge_and_unload"),
    "corda": (lambda folder: _change_config(folder, init_lora_weights="corda"), "adapter_config.json: init_lora"),
    "lora_ga": (lambda folder: _change_config(folder, init_lora_weights="lora_ga"), "adapter_config.json: init_lora"),
    "layers by pattern": (lambda folder: _change_config(folder, target_modules=".*q"), "adapter_config.json"),
    "layers that are not there": (
        lambda folder: _change_config(folder, target_modules=["nope"]),
        "adapter_config.json",
    ),
    "fewer layers": (lambda folder: _change_config(folder, target_modules=["q"]), "adapter_model.safetensors"),
    "another rank": (lambda folder: _change_config(folder, r=8), "adapter_model.safetensors"),
    "truncated": (_truncate, "adapter_model.safetensors"),
    "a tensor too few": (
        lambda folder: _change_tensors(folder, lambda tensors: dict(list(tensors.items())[1:])),
        "adapter_model.safetensors",
    ),
    "a tensor of other shape": (
        lambda folder: _change_tensors(folder, lambda tensors: {n: t[:2].clone() for n, t in tensors.items()}),
        "adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_is_refused_by_name(saved: Path, fault: str) -> None:
    spoil, named = FAULTS[fault]
    spoil(saved)
    with pytest.raises(ConfigError, match=named) as error:
        load_adapter(tiny_denoiser(), saved)
    assert str(saved) in str(error.value)


def test_an_adapter_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors does not match the model: 40 tensors"):
        load_adapter(load_components("tiny-ti2v").denoiser, saved)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_adapter(tiny_denoiser(), tmp_path / "nowhere")


def test_a_second_injection_is_refused(saved: Path) -> None:
    model, _ = adapted()
    with pytest.raises(ConfigError, match="already"):
        inject_lora(model, 4)
    with pytest.raises(ConfigError, match="already"):
        load_adapter(model, saved)
    assert len(lora_layers(model)) == LAYERS


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank must be at least 1, not 0"):
        inject_lora(tiny_denoiser(), 0)
    with pytest.raises(ConfigError, match=r"lora\.target_modules: 'nope' matches no module"):
        inject_lora(tiny_denoiser(), 4, target_modules=["nope"])


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["patch_embedding"], "'patch_embedding' matches patch_embedding, a Conv3d: only linear layers"),
        (["q", "self_attn.norm_q"], r"'self_attn\.norm_q' matches blocks\.0\.self_attn\.norm_q, a RMSNorm"),
        (["ffn"], r"'ffn' matches blocks\.0\.ffn, a Sequential"),
        (["q", "to_q"], "'to_q' matches no module"),
    ],
)
def test_only_linear_layers_are_adapted(targets: list[str], said: str) -> None:
    """PEFT would also adapt a convolution, and would ignore a name without a match if another name matches."""
    model = tiny_denoiser()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=said):
        inject_lora(model, 4, target_modules=targets)
    assert [name for name, _ in model.named_modules()] == before
