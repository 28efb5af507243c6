"""Adapters merged into the weights of a model: what the merged weights compute, and when nothing is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import DIFFERENCES, make_adapter, output, tiny_denoiser, with_alpha, write_distilled, write_flat
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from frostline.cli import app
from frostline.errors import ConfigError
from frostline.models.checkpoints.checkpoint_files import find_files
from frostline.models.checkpoints.loading import load_components
from frostline.models.lora import LoraPair, merge_adapter, read_adapter, write_adapter
from frostline.models.lora.inject import load_adapter, lora_parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_compute_what_the_adapter_did(dtype: torch.dtype, tmp_path: Path) -> None:
    model, adapter = make_adapter(tmp_path / "trained", 6)
    base = {name: tensor.to(dtype) for name, tensor in tiny_denoiser().state_dict().items()}
    merged = merge_adapter(base, adapter)
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    untouched = [name for name in base if name.removesuffix(".weight") not in adapter.layers]
    assert all(merged[name] is base[name] for name in untouched)
    fresh = tiny_denoiser()
    fresh.load_state_dict({name: tensor.float() for name, tensor in merged.items()})
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert (output(fresh) - output(model)).norm() < bound * output(model).norm()
    halved = merge_adapter(base, adapter, lora_scale=0.0)
    assert all(torch.equal(halved[name], tensor) for name, tensor in base.items())


def test_merged_weights_are_rounded_once(tmp_path: Path) -> None:
    """Add the adapter to the tiny model's fp16 weights, and round once: to bf16, or without a precision to fp16."""
    make_adapter(tmp_path / "trained", 6)
    adapter, stored = read_adapter(tmp_path / "trained"), find_files("tiny").denoiser.read_exact()
    for precision, dtype in (("bf16", torch.bfloat16), (None, torch.float16), ("fp32", torch.float32)):
        out = tmp_path / f"{precision}.safetensors"
        asked = [] if precision is None else ["--precision", precision]
        result = CliRunner().invoke(
            app, ["adapter", "merge", "tiny", str(tmp_path / "trained"), "--out", str(out), *asked]
        )
        assert result.exit_code == 0, result.output
        merged = load_file(out)
        assert merged.keys() == stored.keys()
        for name, weight in stored.items():
            exact = weight.float()
            if name.removesuffix(".weight") in adapter.layers:
                pair = adapter.layers[name.removesuffix(".weight")]
                exact = exact + 1.5 * (pair.up @ pair.down)
            assert torch.equal(merged[name], exact.to(dtype)), name


def test_merging_into_another_model_is_refused(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"does not match the model: blocks\.2.* is missing"):
        merge_adapter(load_components("tiny-ti2v").denoiser.state_dict(), adapter)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changed_the_base_is_refused_until_peft_has_converted_it(start: str, tmp_path: Path) -> None:
    """The conversion of PEFT doubles the rank."""
    peft = PeftModel(tiny_denoiser(), LoraConfig(r=4, lora_alpha=8, target_modules=["q"], init_lora_weights=start))  # type: ignore[arg-type]
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(str(tmp_path / "untrained"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora_parameters(peft).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trained = output(peft.get_base_model())
    peft.save_pretrained(
        str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "untrained")
    )
    adapter = read_adapter(tmp_path / "converted")
    assert {(pair.rank, pair.alpha) for pair in adapter.layers.values()} == {(8, 16)}
    fresh = tiny_denoiser()
    fresh.load_state_dict(merge_adapter(fresh.state_dict(), adapter))
    torch.testing.assert_close(output(fresh), trained, atol=1e-4, rtol=1e-4)

    config = tmp_path / "converted" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": start}))
    with pytest.raises(ConfigError, match=rf"{start}.*save_pretrained.*path_initial_model_for_weight_conversion"):
        read_adapter(tmp_path / "converted")


def test_differences_are_merged(tmp_path: Path) -> None:
    adapter, differences, path = write_distilled(tmp_path)
    stored, out = find_files("tiny").denoiser.read_exact(), tmp_path / "merged.safetensors"
    command = ["adapter", "merge", "tiny", str(path), "--lora-scale", "0.5", "--precision", "fp32", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    merged = load_file(out)
    by_parameter = {parameter: differences[name] for name, parameter in DIFFERENCES.items()}
    for name, weight in stored.items():
        expected = weight.float()
        if name in by_parameter:
            expected = expected + 0.5 * by_parameter[name]
        elif (layer := name.removesuffix(".weight")) in adapter.layers:
            expected = expected + 0.5 * 1.5 * (adapter.layers[layer].up @ adapter.layers[layer].down)
        torch.testing.assert_close(merged[name], expected, atol=1e-7, rtol=1e-6)


def test_differences_cannot_be_sampled_or_trained(tmp_path: Path) -> None:
    _, _, path = write_distilled(tmp_path)
    with pytest.raises(ConfigError, match=r"differences of 10 whole parameters .* merge it into the model"):
        load_adapter(tiny_denoiser(), path)


def test_differences_of_nothing_are_none(tmp_path: Path) -> None:
    """Ignore differences that are zero: some programs write zeros for every norm."""
    model, adapter = make_adapter(tmp_path / "trained", 4)
    path = write_flat(adapter, tmp_path / "lora.safetensors", "diffusion_model.{}".format, ("lora_down", "lora_up"))
    save_file({**load_file(path), "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(128)}, path)
    fresh = tiny_denoiser()
    load_adapter(fresh, path)
    assert torch.equal(output(fresh), output(model))


@pytest.mark.filterwarnings("ignore:.*invalid shape")
def test_the_bias_of_b_is_scaled_as_b_is(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q"], init_lora_weights=False, lora_bias=True)
    peft = PeftModel(tiny_denoiser(), config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    peft.save_pretrained(str(tmp_path / "peft"))
    fresh = tiny_denoiser()
    fresh.load_state_dict(merge_adapter(fresh.state_dict(), read_adapter(tmp_path / "peft")))
    torch.testing.assert_close(output(fresh), output(peft.get_base_model()), atol=1e-5, rtol=1e-5)


def test_a_convolution_is_merged_and_not_loaded(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "trained", 4)
    pair = LoraPair(torch.randn(3, 36, 1, 2, 2), torch.randn(128, 3, 1, 1, 1), 6.0)
    adapter = replace(adapter, layers={**adapter.layers, "patch_embedding": pair})
    base = tiny_denoiser().state_dict()
    merged = merge_adapter(base, adapter)["patch_embedding.weight"]
    expected = torch.einsum("or,rcthw->octhw", pair.up.flatten(1), pair.down)
    torch.testing.assert_close(merged - base["patch_embedding.weight"], 2 * expected, atol=1e-5, rtol=1e-5)
    write_adapter(adapter, "comfyui", tmp_path / "lora.safetensors")
    with pytest.raises(
        ConfigError,
        match="changes patch_embedding, a convolution: use base_adapters, or merge it into the model",
    ):
        load_adapter(tiny_denoiser(), tmp_path / "lora.safetensors")


MISFITS: dict[str, tuple[dict[str, Tensor], str]] = {
    "a parameter that is not there": (
        {"blocks.7.modulation": torch.ones(1, 6, 128)},
        r"blocks\.7\.modulation is missing",
    ),
    "of another shape": (
        {"blocks.0.modulation": torch.ones(1, 128)},
        r"is of shape \(1, 6, 128\), the adapter requires \(1, 128\)",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_differences_of_another_model_are_refused(misfit: str, tmp_path: Path) -> None:
    differences, said = MISFITS[misfit]
    adapter = replace(make_adapter(tmp_path, 4)[1], differences=differences)
    with pytest.raises(ConfigError, match=said):
        merge_adapter(tiny_denoiser().state_dict(), adapter)


BROKEN: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "too large for fp16": ({"up": 1e9}, ["--precision", "fp16"], "too large for torch.float16"),
    "a scale that is too large": ({}, ["--lora-scale", "1e39"], "has NaN or infinite values after the merge"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_are_not_finite_are_not_written(case: str, tmp_path: Path) -> None:
    changes, options, said = BROKEN[case]
    _, adapter = make_adapter(tmp_path / "trained", 4)
    layer, pair = next(iter(adapter.layers.items()))
    large = replace(adapter, layers={layer: replace(pair, up=pair.up * changes.get("up", 1))})
    write_adapter(large, "comfyui", tmp_path / "lora.safetensors")
    out = tmp_path / "merged.safetensors"
    command = ["adapter", "merge", "tiny", str(tmp_path / "lora.safetensors"), "--out", str(out), *options]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ConfigError)
    assert f"{layer}.weight" in str(result.exception)
    assert said in str(result.exception)
    assert not out.exists()


def test_a_base_with_nan_is_named(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path, 4)
    base = tiny_denoiser().state_dict()
    base["head.head.bias"] = torch.full_like(base["head.head.bias"], torch.nan)
    with pytest.raises(ConfigError, match=r"head\.head\.bias has NaN or infinite values after the merge"):
        merge_adapter(base, with_alpha(adapter, 2))
