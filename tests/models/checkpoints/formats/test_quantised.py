"""Weights in 8 bits are dequantised when they are loaded or merged; other quantised weights are refused by name."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VARIANTS, make_tensors, save_shards, tiny_tensors, tiny_with, write_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from frostline.cli import app
from frostline.errors import ConfigError
from frostline.models.checkpoints.checkpoint_files import find_files
from frostline.models.checkpoints.formats.convert import to_diffusers
from frostline.models.checkpoints.loading import load_components
from frostline.models.checkpoints.releases import read_spec
from frostline.models.lora.inject import inject_lora, lora_parameters, save_adapter

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Tensors = dict[str, Tensor]


def per_tensor(weight: Tensor) -> Tensor:
    return weight.abs().max() / 448


def per_row(weight: Tensor) -> Tensor:
    return weight.abs().amax(1) / 448


def per_block(weight: Tensor) -> Tensor:
    return weight.reshape(len(weight), -1, 32).abs().amax(2, keepdim=True) / 448


@dataclass(frozen=True)
class Way:
    """How a program stores a weight.

    Attributes:
        scale: computes the scale from the weight.
        name: the last part of the scale's name.
        extra: further tensors of a layer.
        dtype: the dtype of the stored weight.
        marker: whether the file contains the tensor `scaled_fp8`.
        prefix: the prefix of all names.
    """

    scale: Callable[[Tensor], Tensor]
    name: str = "scale_weight"
    extra: Callable[[str], Tensors] = lambda layer: {}
    dtype: torch.dtype = E4M3
    marker: bool = False
    prefix: str = ""


def comfy_quant(layer: str) -> Tensors:
    text = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
    return {f"{layer}.comfy_quant": torch.tensor(list(text.encode()), dtype=torch.uint8)}


def input_scale(layer: str) -> Tensors:
    return {f"{layer}.scale_input": torch.tensor(0.5)}


WAYS = {
    "ComfyUI": Way(per_tensor, marker=True),
    "ComfyUI with scales of activations": Way(per_tensor, extra=input_scale, marker=True),
    "ComfyUI in a checkpoint": Way(per_tensor, marker=True, prefix="model.diffusion_model."),
    "ComfyUI since 2025": Way(per_tensor, "weight_scale", comfy_quant),
    "ComfyUI since 2025, in a checkpoint": Way(
        per_tensor, "weight_scale", comfy_quant, prefix="model.diffusion_model."
    ),
    "one scale in a vector": Way(lambda weight: per_tensor(weight).reshape(1), "weight_scale"),
    "a scale for each row": Way(per_row, "weight_scale"),
    "a scale for each row in a column": Way(lambda weight: per_row(weight)[:, None]),
    "musubi-tuner, blocks of a row": Way(per_block),
    "five bits of exponent": Way(lambda weight: weight.abs().max() / 57344, marker=True, dtype=E5M2),
}


def quantise(tensors: Tensors, way: Way) -> tuple[Tensors, Tensors]:
    """Return the tensors as the program stores them, and the fp32 weights that they represent."""
    stored: Tensors = {f"{way.prefix}scaled_fp8": torch.zeros(2, dtype=way.dtype)} if way.marker else {}
    exact: Tensors = {}
    for name, tensor in tensors.items():
        weight = tensor.float()
        if not name.startswith("blocks.") or tensor.ndim != 2 or not name.endswith(".weight"):
            stored[way.prefix + name], exact[name] = tensor, weight
            continue
        layer, scale = name.removesuffix(".weight"), way.scale(weight)
        # The scale of each element, whatever the shape of the scale in the file.
        spread = scale.reshape(len(weight), -1) if scale.numel() > 1 else scale.reshape(1, 1)
        spread = spread.repeat_interleave(weight.shape[1] // spread.shape[1], 1)
        values = (weight / spread).to(way.dtype)
        exact[name] = values.float() * spread
        stored |= {f"{way.prefix}{name}": values, f"{way.prefix}{layer}.{way.name}": scale}
        stored |= way.extra(way.prefix + layer)
    return stored, exact


@pytest.mark.parametrize("name", WAYS)
def test_weights_are_dequantised(name: str, tmp_path: Path) -> None:
    stored, exact = quantise(tiny_tensors(), WAYS[name])
    folder = tiny_with(tmp_path / "model", stored)
    loaded = load_components(folder).denoiser.state_dict()
    assert loaded.keys() == exact.keys()
    for parameter, weight in exact.items():
        assert torch.equal(loaded[parameter], weight), parameter
    assert (exact["blocks.0.ffn.0.weight"] - tiny_tensors()["blocks.0.ffn.0.weight"].float()).abs().max() > 0
    rounded = load_components(folder, torch.bfloat16).denoiser.state_dict()
    assert all(torch.equal(rounded[parameter], weight.bfloat16()) for parameter, weight in exact.items())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_weights_that_were_only_cast_need_no_scale(dtype: torch.dtype, tmp_path: Path) -> None:
    cast = {n: t.to(dtype) if t.ndim == 2 else t for n, t in tiny_tensors().items()}
    loaded = load_components(tiny_with(tmp_path / "model", cast)).denoiser.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in cast.items())


def test_what_comfyui_says_in_the_header_is_read(tmp_path: Path) -> None:
    stored, exact = quantise(tiny_tensors(), Way(per_tensor, "weight_scale"))
    layers = {name.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for name in stored if "scale" in name}
    said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    loaded = load_components(tiny_with(tmp_path / "model", stored, said)).denoiser.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in exact.items())
    layers["blocks.0.ffn.0"] = {"format": "nvfp4"}
    said = {"_quantization_metadata": json.dumps({"layers": layers})}
    with pytest.raises(ConfigError, match=r"quantised as nvfp4 \(ComfyUI\)"):
        find_files(tiny_with(tmp_path / "other", stored, said))


def test_a_scale_may_lie_in_another_shard_and_names_be_those_of_diffusers(tmp_path: Path) -> None:
    name = "Wan2.1-T2V"
    tensors = make_tensors(VARIANTS[name])
    folder = write_diffusers(tmp_path / name, VARIANTS[name], tensors)
    stored, exact = quantise(to_diffusers("denoiser", tensors["denoiser"]), Way(per_row))
    for path in (folder / "transformer").glob("*.*"):
        if path.name != "config.json":
            path.unlink()
    renamed = {f"z.{n}" if n.endswith("scale_weight") else n: t for n, t in stored.items()}
    paths = save_shards(renamed, folder / "transformer", "diffusion_pytorch_model", index=False)
    for path in paths:
        save_file({n.removeprefix("z."): t for n, t in load_file(path).items()}, path)
    assert not any(n.endswith("scale_weight") for n in load_file(paths[0]))
    loaded = to_diffusers("denoiser", load_components(folder).denoiser.state_dict())
    assert all(torch.equal(loaded[parameter], weight) for parameter, weight in exact.items())


@pytest.mark.parametrize("defer", [(), ("text_encoder",)])
def test_a_text_encoder_as_comfyui_has_it(defer: tuple[str, ...], tmp_path: Path) -> None:
    """Load a text encoder in 8 bits, in a file that also contains the tokenizer."""
    name = "Wan2.1-T2V"
    tensors = make_tensors(VARIANTS[name])
    folder = write_diffusers(tmp_path / name, VARIANTS[name], tensors)
    spelled = to_diffusers("text_encoder", tensors["text_encoder"])
    stored: Tensors = {"scaled_fp8": torch.zeros(0, dtype=E4M3), "spiece_model": torch.zeros(99, dtype=torch.uint8)}
    for parameter, tensor in spelled.items():
        if ".SelfAttention.q." in parameter or ".wo." in parameter:
            scale = per_tensor(tensor)
            stored |= {parameter: (tensor / scale).to(E4M3), parameter.replace(".weight", ".scale_weight"): scale}
            spelled[parameter] = stored[parameter].float() * scale
        else:
            stored[parameter] = tensor
    save_file(stored, folder / "text_encoder" / "model.safetensors")
    components = load_components(folder, defer=defer)
    if defer:
        components.weights["text_encoder"].restore()
    loaded = to_diffusers("text_encoder", components.text_encoder.state_dict())
    assert all(torch.equal(loaded[parameter], tensor) for parameter, tensor in spelled.items())


@pytest.mark.parametrize("name", ["ComfyUI", "ComfyUI in a checkpoint", "musubi-tuner, blocks of a row", "only cast"])
def test_an_adapter_is_merged_into_the_weights_they_stand_for(name: str, tmp_path: Path) -> None:
    """Round the whole sum once, to the dtype of the other weights or to the requested one."""
    if name == "only cast":
        stored = {n: t.to(E4M3) if t.ndim == 2 else t for n, t in tiny_tensors().items()}
        exact = {n: t.float() for n, t in stored.items()}
    else:
        stored, exact = quantise(tiny_tensors(), WAYS[name])
    model = tiny_with(tmp_path / "model", stored)
    denoiser = load_components("tiny").denoiser
    config = inject_lora(denoiser, 4, 6)
    with torch.no_grad():
        for matrix in lora_parameters(denoiser).values():
            matrix.copy_(0.05 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(3)))
    save_adapter(denoiser, config, tmp_path / "adapter")
    matrices = {n.replace(".default.weight", ""): m.detach() for n, m in lora_parameters(denoiser).items()}
    for precision, dtype in ((None, torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        out = tmp_path / f"{precision}.safetensors"
        options = [] if precision is None else ["--precision", precision]
        command = ["adapter", "merge", str(model), str(tmp_path / "adapter"), "--out", str(out), *options]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        merged = load_file(out)
        assert merged.keys() == exact.keys()
        for parameter, weight in exact.items():
            layer = parameter.removesuffix(".weight")
            if f"{layer}.lora_A" in matrices:
                weight = weight + 1.5 * (matrices[f"{layer}.lora_B"] @ matrices[f"{layer}.lora_A"])
            assert torch.equal(merged[parameter], weight.to(dtype)), parameter


def uint8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


LAYER = "blocks.0.ffn.0"
INT8 = {f"{LAYER}.weight": torch.zeros(512, 128, dtype=torch.int8)}
REFUSED: dict[str, tuple[Tensors, str]] = {
    "NF4": ({f"{LAYER}.weight.quant_state.bitsandbytes__nf4": uint8(9)}, r"NF4 \(bitsandbytes\)"),
    "FP4": ({f"{LAYER}.weight.quant_state.bitsandbytes__fp4": uint8(9)}, r"FP4 \(bitsandbytes\)"),
    "INT8 of bitsandbytes": ({**INT8, f"{LAYER}.SCB": torch.ones(512)}, r"INT8 \(bitsandbytes\)"),
    "INT8 with a scale": ({**INT8, f"{LAYER}.weight_scale": torch.ones(512, 1)}, r"int8 \(blocks\.0\.ffn\.0\.weight\)"),
    "GPTQ": ({f"{LAYER}.qweight": torch.zeros(2, dtype=torch.int32)}, "GPTQ or AWQ"),
    "SVDQuant": ({f"{LAYER}.qweight": torch.zeros(2), f"{LAYER}.wscales": torch.zeros(2)}, r"SVDQuant \(Nunchaku\)"),
    "Quanto": ({f"{LAYER}.weight._data": torch.zeros(2, 2, dtype=torch.int8)}, "Quanto"),
    "NVFP4": ({f"{LAYER}.weight": uint8(512, 64), f"{LAYER}.weight_scale_2": torch.ones(())}, "NVFP4"),
    "square blocks": ({f"{LAYER}.weight_scale_inv": torch.ones(4, 1)}, "FP8 with a scale for each square block"),
    "another way of ComfyUI": (
        {f"{LAYER}.comfy_quant": torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)},
        r"int8_tensorwise \(ComfyUI\)",
    ),
    "text that is none": ({f"{LAYER}.comfy_quant": uint8(3)}, "describes how weights are quantised, cannot be read"),
    "packed": ({f"{LAYER}.weight": uint8(512, 64)}, r"uint8 \(blocks\.0\.ffn\.0\.weight\)"),
    "scaled but not in 8 bits": ({f"{LAYER}.scale_weight": torch.ones(())}, "float16 with a scale"),
    "a scale of nothing": (
        {"blocks.0.nothing.scale_weight": torch.ones(())},
        "is the scale of blocks.0.nothing.weight",
    ),
    "a scale that does not fit": (
        {f"{LAYER}.weight": torch.zeros(512, 128, dtype=E4M3), f"{LAYER}.weight_scale": torch.ones(4, 1)},
        r"weight_scale has shape \(4, 1\), which does not match blocks\.0\.ffn\.0\.weight of shape \(512, 128\)",
    ),
    "two scales": (
        {
            f"{LAYER}.weight": torch.zeros(512, 128, dtype=E4M3),
            **{f"{LAYER}.{name}": torch.ones(()) for name in ("weight_scale", "scale_weight")},
        },
        "has two scales",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_quantised_weights_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """Refuse them also if only sizes are read."""
    change, said = REFUSED[name]
    folder = tiny_with(tmp_path / "model", {**tiny_tensors(), **change})
    for read in (load_components, read_spec):
        with pytest.raises(ConfigError, match=said) as error:
            read(folder)
        assert str(folder) in str(error.value)


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_with(tmp_path / "model", tiny_tensors())
    weights = folder / "diffusion_pytorch_model.safetensors"
    gguf = folder / "wan-Q4_K_M.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    assert find_files(folder).denoiser.paths == (weights,)
    weights.unlink()
    others: list[Any] = list(folder.glob("*.safetensors"))
    for model in (folder, [gguf, *others, folder / "google" / "umt5-xxl"], gguf):
        with pytest.raises(ConfigError, match=r"wan-Q4_K_M\.gguf .*is GGUF \(quantised weights\)"):
            find_files(model)
    experts = tiny_with(tmp_path / "experts", tiny_tensors())
    (experts / "diffusion_pytorch_model.safetensors").unlink()
    for name in ("low_noise_model", "high_noise_model"):
        (experts / name).mkdir()
        (experts / name / "wan.gguf").write_bytes(gguf.read_bytes())
    with pytest.raises(ConfigError, match=r"low_noise_model/wan\.gguf is GGUF"):
        find_files(experts)


def test_a_weight_without_a_scale_beside_others_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored, exact = quantise(tiny_tensors(), WAYS["ComfyUI"])
    del stored[f"{LAYER}.scale_weight"]
    with caplog.at_level(logging.WARNING, "frostline"):
        loaded = load_components(tiny_with(tmp_path / "model", stored)).denoiser.state_dict()
    assert "1 8-bit weights have no scale, although others have one: they are not scaled" in caplog.text
    assert "the first is blocks.0.ffn.0.weight" in caplog.text
    assert torch.equal(loaded[f"{LAYER}.weight"], stored[f"{LAYER}.weight"].float())
    assert torch.equal(loaded["blocks.0.ffn.2.weight"], exact["blocks.0.ffn.2.weight"])
