"""Adapters in the format of every program, read back by frostline and by the loaders of other programs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_files import make_adapter, output, place, same_update, tiny_denoiser, uneven
from diffsynth.utils.lora import GeneralLoRALoader
from peft import PeftModel
from safetensors.torch import load_file

from frostline.errors import ConfigError
from frostline.models.checkpoints.formats.convert import to_diffusers
from frostline.models.lora import FORMATS, LoraPair, merge_adapter, read_adapter, write_adapter
from frostline.models.lora.inject import load_adapter, lora_layers

KEEP_ALPHA = ("peft", "comfyui", "musubi")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("alpha", [4, 8, 6])
def test_there_and_back(name: str, alpha: float, tmp_path: Path) -> None:
    """Compare bit for bit if the format stores alpha, or if the scale that goes into B is a power of two."""
    model, adapter = make_adapter(tmp_path / "trained", alpha)
    write_adapter(adapter, name, place(tmp_path, name))
    other = read_adapter(place(tmp_path, name))
    assert other.layers.keys() == adapter.layers.keys()
    keeps_scale = name in KEEP_ALPHA
    for layer, pair in adapter.layers.items():
        assert other.layers[layer].scale == (alpha / 4 if keeps_scale else 1)
        assert torch.equal(other.layers[layer].down, pair.down)
        assert torch.equal(other.layers[layer].up, pair.up if keeps_scale else pair.up * (alpha / 4))
    fresh = tiny_denoiser()
    load_adapter(fresh, place(tmp_path, name))
    if keeps_scale or alpha in (4, 8):
        assert torch.equal(output(fresh), output(model))
    torch.testing.assert_close(output(fresh), output(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("through", FORMATS)
def test_any_format_becomes_any_other(through: str, tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "trained", 4)
    write_adapter(adapter, through, place(tmp_path, through))
    for name in FORMATS:
        write_adapter(read_adapter(place(tmp_path, through)), name, place(tmp_path / "again", name))
        other = read_adapter(place(tmp_path / "again", name))
        for layer, pair in adapter.layers.items():
            assert (other.layers[layer].rank, other.layers[layer].alpha) == (4, 4)
            assert torch.equal(other.layers[layer].down, pair.down)
            assert torch.equal(other.layers[layer].up, pair.up)


@pytest.mark.parametrize("name", FORMATS)
def test_plain_peft_takes_what_was_converted(name: str, tmp_path: Path) -> None:
    model, adapter = make_adapter(tmp_path / "trained", 8, target_modules=("self_attn.q", "ffn.2"))
    write_adapter(adapter, name, place(tmp_path, name))
    write_adapter(read_adapter(place(tmp_path, name)), "peft", tmp_path / "again")
    peft = PeftModel.from_pretrained(tiny_denoiser(), str(tmp_path / "again"))
    assert len(lora_layers(peft)) == 4 * 2
    assert torch.equal(output(peft.get_base_model()), output(model))


@pytest.mark.parametrize("name", ["diffsynth", "comfyui"])
@pytest.mark.filterwarnings("ignore:Alpha detected")
def test_diffsynths_loader_takes_it(name: str, tmp_path: Path) -> None:
    model, adapter = make_adapter(tmp_path / "trained", 8)
    write_adapter(adapter, name, place(tmp_path, name))
    fused = tiny_denoiser()
    GeneralLoRALoader().fuse_lora_to_base_model(fused, load_file(place(tmp_path, name)))
    torch.testing.assert_close(output(fused), output(model), atol=1e-5, rtol=1e-5)
    ours = merge_adapter(tiny_denoiser().state_dict(), adapter)
    for name, tensor in fused.state_dict().items():
        torch.testing.assert_close(tensor, ours[name], atol=1e-7, rtol=1e-6)


def test_comfyuis_rule_gives_the_same_weights(tmp_path: Path) -> None:
    """Apply ComfyUI's rule: the layer is named `diffusion_model.<path>`, and gets `alpha / rank * up @ down` added."""
    _, adapter = make_adapter(tmp_path / "trained", 6)
    write_adapter(adapter, "comfyui", tmp_path / "comfyui.safetensors")
    lora, weights = load_file(tmp_path / "comfyui.safetensors"), tiny_denoiser().state_dict()
    expected, used = dict(weights), set()
    for name in weights:
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        up, down, alpha = (lora.get(f"{layer}.{leaf}") for leaf in ("lora_up.weight", "lora_down.weight", "alpha"))
        if up is not None and down is not None and alpha is not None:
            expected[name] = weights[name] + alpha.item() / down.shape[0] * (up @ down)
            used |= {f"{layer}.{leaf}" for leaf in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert used == lora.keys()
    merged = merge_adapter(weights, adapter)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-7, rtol=1e-6)


def test_diffusers_names_are_those_of_its_layers(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "trained", 4)
    write_adapter(adapter, "diffusers", tmp_path / "diffusers.safetensors")
    weights = to_diffusers("denoiser", tiny_denoiser().state_dict())
    names = load_file(tmp_path / "diffusers.safetensors").keys()
    assert len(names) == 2 * len(adapter.layers)
    for name in names:
        layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        assert f"{layer}.weight" in weights
    assert "transformer.blocks.0.attn1.to_out.0.lora_A.weight" in names


def test_a_scale_that_goes_into_b_is_not_rounded_to_the_type_of_the_file(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "trained", 6)
    rounded = {
        layer: replace(pair, down=pair.down.bfloat16(), up=pair.up.bfloat16()) for layer, pair in adapter.layers.items()
    }
    write_adapter(replace(adapter, layers=rounded), "diffsynth", tmp_path / "lora.safetensors", torch.float32)
    for layer, pair in read_adapter(tmp_path / "lora.safetensors").layers.items():
        assert torch.equal(pair.up, 1.5 * rounded[layer].up.float())


def test_an_adapter_of_another_kind_of_model_is_not_converted(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "trained", 6)
    strange = replace(adapter, layers={"down_blocks.0.attn": next(iter(adapter.layers.values()))})
    with pytest.raises(
        ConfigError,
        match=r"adapter_model\.safetensors has the layer down_blocks\.0\.attn, which the denoiser does not have",
    ):
        write_adapter(strange, "diffusers", tmp_path / "lora.safetensors")


@pytest.mark.parametrize("name", FORMATS)
def test_ranks_and_alphas_of_each_layer_survive(name: str, tmp_path: Path) -> None:
    """Keep rank and alpha if the format stores them; otherwise multiply the scale into B. Then write and read again."""
    adapter = uneven(make_adapter(tmp_path / "trained", 4)[1])
    write_adapter(adapter, name, place(tmp_path, name))
    read = read_adapter(place(tmp_path, name))
    assert same_update(read, adapter)
    for layer, pair in adapter.layers.items():
        kept = name in KEEP_ALPHA
        assert (read.layers[layer].rank, read.layers[layer].alpha) == (pair.rank, pair.alpha if kept else pair.rank)
    write_adapter(read, "comfyui", tmp_path / "again.safetensors")
    assert same_update(read_adapter(tmp_path / "again.safetensors"), adapter)


def test_plain_peft_loads_ranks_and_alphas_of_each_layer(tmp_path: Path) -> None:
    adapter = uneven(make_adapter(tmp_path / "trained", 4)[1])
    write_adapter(adapter, "peft", tmp_path / "peft")
    peft = PeftModel.from_pretrained(tiny_denoiser(), str(tmp_path / "peft"))
    merged = tiny_denoiser()
    merged.load_state_dict(merge_adapter(merged.state_dict(), adapter))
    torch.testing.assert_close(output(peft.get_base_model()), output(merged), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_a_convolution_goes_only_to_programs_that_know_it(name: str, tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "trained", 4)
    pair = LoraPair(torch.randn(3, 36, 1, 2, 2), torch.randn(128, 3, 1, 1, 1), 6.0)
    adapter = replace(adapter, layers={**adapter.layers, "patch_embedding": pair})
    if name in ("diffsynth", "musubi"):
        with pytest.raises(
            ConfigError, match=f"changes patch_embedding, a convolution, which {name} does not support: choose"
        ):
            write_adapter(adapter, name, place(tmp_path, name))
        return
    write_adapter(adapter, name, place(tmp_path, name))
    assert same_update(read_adapter(place(tmp_path, name)), adapter)
    if name == "peft":
        peft = PeftModel.from_pretrained(tiny_denoiser(), str(tmp_path / "peft")).merge_and_unload()
        expected = merge_adapter(tiny_denoiser().state_dict(), adapter)
        for parameter, weight in peft.state_dict().items():
            torch.testing.assert_close(weight, expected[parameter], atol=1e-6, rtol=1e-5)


def test_differences_go_to_comfyui_under_names_that_it_reads(tmp_path: Path) -> None:
    """Write `X.diff` for a weight, `X.diff_b` for a bias, and `P.diff` for a parameter `P` without a module."""
    _, adapter = make_adapter(tmp_path / "trained", 4)
    shapes = {
        "blocks.0.self_attn.norm_q.weight": (128,),
        "blocks.0.self_attn.q.bias": (128,),
        "blocks.0.modulation": (1, 6, 128),
        "patch_embedding.weight": (128, 36, 1, 2, 2),
    }
    adapter = replace(adapter, differences={parameter: torch.randn(shape) for parameter, shape in shapes.items()})
    write_adapter(adapter, "comfyui", tmp_path / "comfyui.safetensors")
    names = {name for name in load_file(tmp_path / "comfyui.safetensors") if "diff" in name.removeprefix("diffusion")}
    assert names == {
        "diffusion_model.blocks.0.self_attn.norm_q.diff",
        "diffusion_model.blocks.0.self_attn.q.diff_b",
        "diffusion_model.blocks.0.modulation.diff",
        "diffusion_model.patch_embedding.diff",
    }
    again = read_adapter(tmp_path / "comfyui.safetensors")
    assert again.differences.keys() == shapes.keys()
    assert all(torch.equal(again.differences[parameter], adapter.differences[parameter]) for parameter in shapes)
    for name in ("peft", "diffsynth", "diffusers"):
        with pytest.raises(ConfigError, match=rf"4 whole parameters .* which the {name} format does not support"):
            write_adapter(adapter, name, place(tmp_path, name))
        assert not place(tmp_path, name).exists()


def test_values_too_large_for_the_type_are_refused(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "trained", 4)
    layer, pair = next(iter(adapter.layers.items()))
    large = replace(adapter, layers={**adapter.layers, layer: replace(pair, up=pair.up + 1e6)})
    for name in FORMATS:
        with pytest.raises(ConfigError, match=r"values too large for torch\.float16: use --precision bf16 or fp32"):
            write_adapter(large, name, place(tmp_path, name), torch.float16)
        assert not place(tmp_path, name).exists()
