"""Adapters in the spelling of every program: what each loader makes of our files, and what we make of theirs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffsynth.utils.lora import GeneralLoRALoader
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from frostline.cli import app
from frostline.errors import ConfigError, DataError
from frostline.models.adapters import (
    SPELLINGS,
    Adapter,
    merge_adapter,
    read_adapter,
    write_adapter,
)
from frostline.models.denoiser import Denoiser
from frostline.models.files import find_files
from frostline.models.layouts.convert import to_diffusers
from frostline.models.loading import load_components
from frostline.models.lora import copy_adapter, inject_lora, load_adapter, lora_layers, lora_parameters, save_adapter


def tiny_denoiser(dtype: torch.dtype = torch.float32) -> Any:
    return load_components("tiny", dtype).denoiser


@torch.no_grad()
def output(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(shape, generator=generator) for shape in ((2, 16, 2, 4, 6), (2, 16, 64), (2, 20, 2, 4, 6))]
    return Denoiser(model)(inputs[0], torch.tensor([900.0, 300.0]), inputs[1], inputs[2])


def make_adapter(folder: Path, alpha: float, rank: int = 4, **arguments: Any) -> tuple[Any, Adapter]:
    """A denoiser with a random adapter, and the adapter as read from where it was saved."""
    model = tiny_denoiser()
    config = inject_lora(model, rank, alpha, **arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, config, folder)
    return model, read_adapter(folder)


def place(folder: Path, spelling: str) -> Path:
    return folder / spelling if spelling == "peft" else folder / f"{spelling}.safetensors"


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", [4, 8, 6])
def test_there_and_back(spelling: str, alpha: float, tmp_path: Path) -> None:
    """Bit for bit: where alpha is kept always, where the scale goes into B if that is a power of two."""
    model, adapter = make_adapter(tmp_path / "trained", alpha)
    write_adapter(adapter, spelling, place(tmp_path, spelling))
    other = read_adapter(place(tmp_path, spelling))
    assert other.layers.keys() == adapter.layers.keys()
    keeps_scale = spelling in ("peft", "comfyui")
    assert other.scale == (adapter.scale if keeps_scale else 1)
    for layer, (down, up) in adapter.layers.items():
        assert torch.equal(other.layers[layer][0], down)
        assert torch.equal(other.layers[layer][1], up if keeps_scale else up * (alpha / 4))
    fresh = tiny_denoiser()
    load_adapter(fresh, place(tmp_path, spelling))
    if keeps_scale or alpha in (4, 8):
        assert torch.equal(output(fresh), output(model))
    torch.testing.assert_close(output(fresh), output(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("through", SPELLINGS)
def test_any_spelling_becomes_any_other(through: str, tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "trained", 4)
    write_adapter(adapter, through, place(tmp_path, through))
    for spelling in SPELLINGS:
        write_adapter(read_adapter(place(tmp_path, through)), spelling, place(tmp_path / "again", spelling))
        other = read_adapter(place(tmp_path / "again", spelling))
        assert (other.rank, other.alpha) == (4, 4)
        for layer, matrices in adapter.layers.items():
            assert all(torch.equal(a, b) for a, b in zip(matrices, other.layers[layer], strict=True))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_plain_peft_takes_what_was_converted(spelling: str, tmp_path: Path) -> None:
    model, adapter = make_adapter(tmp_path / "trained", 8, target_modules=("self_attn.q", "ffn.2"))
    write_adapter(adapter, spelling, place(tmp_path, spelling))
    write_adapter(read_adapter(place(tmp_path, spelling)), "peft", tmp_path / "again")
    peft = PeftModel.from_pretrained(tiny_denoiser(), str(tmp_path / "again"))
    assert len(lora_layers(peft)) == 4 * 2
    assert torch.equal(output(peft.get_base_model()), output(model))


@pytest.mark.parametrize("spelling", ["diffsynth", "comfyui"])
@pytest.mark.filterwarnings("ignore:Alpha detected")
def test_diffsynths_loader_takes_it(spelling: str, tmp_path: Path) -> None:
    model, adapter = make_adapter(tmp_path / "trained", 8)
    write_adapter(adapter, spelling, place(tmp_path, spelling))
    fused = tiny_denoiser()
    GeneralLoRALoader().fuse_lora_to_base_model(fused, load_file(place(tmp_path, spelling)))
    torch.testing.assert_close(output(fused), output(model), atol=1e-5, rtol=1e-5)
    ours = merge_adapter(tiny_denoiser().state_dict(), adapter)
    for name, tensor in fused.state_dict().items():
        torch.testing.assert_close(tensor, ours[name], atol=1e-7, rtol=1e-6)


def test_comfyuis_rule_gives_the_same_weights(tmp_path: Path) -> None:
    """Its loader knows a layer of its model as `diffusion_model.<path>` and adds `alpha / rank * up @ down` to it."""
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


def write_diffusers(path: Path, adapter: Adapter, prefix: str = "transformer.", **changes: Any) -> None:
    """As `save_lora_weights` of diffusers: the matrices as trained, PEFT's config in the header."""
    write_adapter(replace(adapter, alpha=adapter.rank), "diffusers", path)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    config = LoraConfig(r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=targets).to_dict()
    settings = {**config, "target_modules": targets, **changes}
    packed = json.dumps({prefix + name: value for name, value in settings.items()})
    tensors = {name.replace("transformer.", prefix): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": packed})


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_the_scale_in_a_file_of_diffusers_counts(prefix: str, tmp_path: Path) -> None:
    """Of a pipeline under the name of the denoiser, of a model alone under none."""
    model, adapter = make_adapter(tmp_path / "trained", 6)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_diffusers(path, adapter, prefix)
    assert read_adapter(path).alpha == 6
    fresh = tiny_denoiser()
    load_adapter(fresh, path)
    assert torch.equal(output(fresh), output(model))


STATED: dict[str, tuple[dict[str, Any], str]] = {
    "rank-stabilised": ({"use_rslora": True}, "use_rslora is not supported"),
    "magnitudes": ({"use_dora": True}, "use_dora is not supported"),
    "scales of their own": ({"alpha_pattern": {"to_q": 9}}, "alpha_pattern is not supported"),
    "a changed base": ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    "another rank": ({"r": 8}, "has rank 4, .* says 8"),
    "fewer layers": ({"target_modules": ["to_q"]}, r"does not target blocks\.0\.attn1\.to_k"),
    "another method": ({"peft_type": "IA3"}, "is no LoRA"),
}


@pytest.mark.parametrize("fault", STATED)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_what_a_file_of_diffusers_says_is_refused_as_in_a_folder(fault: str, tmp_path: Path) -> None:
    changes, said = STATED[fault]
    _, adapter = make_adapter(tmp_path / "trained", 8)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_diffusers(path, adapter, **changes)
    with pytest.raises(ConfigError, match=said) as error:
        read_adapter(path)
    assert f"lora_adapter_metadata of {path}" in str(error.value)


def test_a_scale_said_twice_and_damaged_metadata_are_refused(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "trained", 8)
    path = tmp_path / "lora.safetensors"
    write_diffusers(path, adapter)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({**tensors, "transformer.blocks.0.attn1.to_q.alpha": torch.tensor(4.0)}, path, metadata=metadata)
    with pytest.raises(ConfigError, match=r"scale in its \.alpha tensors and one in lora_adapter_metadata"):
        read_adapter(path)
    for text, said in (
        ("{", "is not valid JSON"),
        ("[1]", "must be a mapping"),
        ('{"text_encoder.r": 4}', "cannot be"),
    ):
        save_file(tensors, path, metadata={"lora_adapter_metadata": text})
        with pytest.raises(ConfigError, match=rf"lora_adapter_metadata of .*lora\.safetensors {said}"):
            read_adapter(path)


def test_comfyui_files_of_other_trainers_are_read(tmp_path: Path) -> None:
    """`diffusion_model.` with the matrices called A and B, and no alpha."""
    model, adapter = make_adapter(tmp_path / "trained", 4)
    tensors = {}
    for layer, (down, up) in adapter.layers.items():
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = down
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = up
    save_file(tensors, tmp_path / "other.safetensors")
    fresh = tiny_denoiser()
    load_adapter(fresh, tmp_path / "other.safetensors")
    assert torch.equal(output(fresh), output(model))


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
    """fp16, as the tiny model's files have it, plus the adapter, to bf16; without a precision fp16 again."""
    make_adapter(tmp_path / "trained", 6)
    adapter, stored = read_adapter(tmp_path / "trained"), find_files("tiny").denoiser.read(None, "cpu")
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
                down, up = adapter.layers[name.removesuffix(".weight")]
                exact = exact + 1.5 * (up @ down)
            assert torch.equal(merged[name], exact.to(dtype)), name


def test_a_scale_that_goes_into_b_is_not_rounded_to_the_type_of_the_file(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "trained", 6)
    rounded = {layer: (down.bfloat16(), up.bfloat16()) for layer, (down, up) in adapter.layers.items()}
    write_adapter(replace(adapter, layers=rounded), "diffsynth", tmp_path / "lora.safetensors", torch.float32)
    for layer, (_, up) in read_adapter(tmp_path / "lora.safetensors").layers.items():
        assert torch.equal(up, 1.5 * rounded[layer][1].float())


def test_the_weights_of_a_folder_mean_the_folder(tmp_path: Path) -> None:
    make_adapter(tmp_path, 6)
    assert read_adapter(tmp_path / "adapter_model.safetensors").scale == read_adapter(tmp_path).scale == 1.5


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    make_adapter(tmp_path, 4)
    model = tiny_denoiser()
    before, names = output(model), [name for name, _ in model.named_modules()]
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    last = sorted(tensors)[-1]
    for change in ({last: tensors[last][:3].clone()}, {f"{last}.more": torch.zeros(1)}, {last: torch.zeros(0)}):
        save_file({**tensors, **change}, weights)
        with pytest.raises(ConfigError, match="adapter_model"):
            load_adapter(model, tmp_path)
        assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(output(model), before)
    save_file(tensors, weights)
    load_adapter(model, tmp_path)
    assert len(lora_layers(model)) == 40


def test_a_peft_folder_with_the_names_of_diffusers_is_read(tmp_path: Path) -> None:
    model, adapter = make_adapter(tmp_path / "trained", 8, target_modules=("self_attn.q", "ffn.2"))
    write_adapter(replace(adapter, alpha=4), "diffusers", tmp_path / "diffusers.safetensors")
    folder = tmp_path / "folder"
    LoraConfig(r=4, lora_alpha=8, target_modules=["attn1.to_q", "net.2"]).save_pretrained(str(folder))
    tensors = load_file(tmp_path / "diffusers.safetensors")
    renamed = {name.replace("transformer.", "base_model.model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    fresh = tiny_denoiser()
    load_adapter(fresh, folder)
    assert torch.equal(output(fresh), output(model))
    write_adapter(read_adapter(folder), "peft", tmp_path / "again")
    peft = PeftModel.from_pretrained(tiny_denoiser(), str(tmp_path / "again"))
    assert torch.equal(output(peft.get_base_model()), output(model))


PARTS: dict[str, tuple[dict[str, Any], int]] = {
    "one block": ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "blocks"}, 2),
    "the first blocks": ({"target_modules": ["q"], "layers_to_transform": [0, 1], "layers_pattern": "blocks"}, 4),
    "all but some": ({"target_modules": ["q", "ffn.2"], "exclude_modules": ["cross_attn.q"]}, 8),
    "a weight by name": ({"target_modules": ["ffn.2"], "target_parameters": ["blocks.1.self_attn.k.weight"]}, 5),
    "by pattern": ({"target_modules": r"blocks\.[02]\..*\.(q|k)"}, 8),
}


@pytest.mark.parametrize("part", PARTS)
def test_an_adapter_on_a_part_of_the_layers(part: str, tmp_path: Path) -> None:
    """Read, and written again, it is on just these, however they were chosen."""
    arguments, count = PARTS[part]
    peft = PeftModel(tiny_denoiser(), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **arguments))
    peft.save_pretrained(str(tmp_path / "part"))
    fresh = tiny_denoiser()
    load_adapter(fresh, tmp_path / "part")
    assert len(lora_layers(fresh)) == count
    torch.testing.assert_close(output(fresh), output(peft.get_base_model()), atol=1e-5, rtol=1e-5)
    write_adapter(read_adapter(tmp_path / "part"), "peft", tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_denoiser(), str(tmp_path / "again"))
    assert len(lora_layers(again)) == count
    assert torch.equal(output(again.get_base_model()), output(fresh))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changed_the_base_is_refused_until_peft_has_converted_it(start: str, tmp_path: Path) -> None:
    """PEFT doubles the rank as it converts."""
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
    assert (adapter.rank, adapter.alpha) == (8, 16)
    fresh = tiny_denoiser()
    fresh.load_state_dict(merge_adapter(fresh.state_dict(), adapter))
    torch.testing.assert_close(output(fresh), trained, atol=1e-4, rtol=1e-4)

    config = tmp_path / "converted" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": start}))
    with pytest.raises(ConfigError, match=rf"{start}.*save_pretrained.*path_initial_model_for_weight_conversion"):
        read_adapter(tmp_path / "converted")


def test_copying_into_other_layers_is_refused(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path, 4)
    model = tiny_denoiser()
    inject_lora(model, 8)
    with pytest.raises(ConfigError, match="the model wants"):
        copy_adapter(model, adapter)


FAULTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no LoRA": ({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, "is no LoRA of a denoiser: blocks.0.self_attn.q"),
    "nothing": ({}, "is no whole LoRA"),
    "one matrix": ({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 2)}, r"blocks\.0\.ffn\.0 lacks one"),
    "of two ranks": (
        {
            f"blocks.{n}.ffn.0.lora_{kind}.weight": torch.zeros(*((2 + n, 4) if kind == "A" else (4, 2 + n)))
            for n in range(2)
            for kind in "AB"
        },
        "one rank",
    ),
    "that do not fit": (
        {"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 2), "blocks.0.ffn.0.lora_B.weight": torch.zeros(2, 3)},
        "do not fit each other",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused(fault: str, tmp_path: Path) -> None:
    tensors, said = FAULTS[fault]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match=said) as error:
        read_adapter(tmp_path / "lora.safetensors")
    assert "lora.safetensors" in str(error.value)


def test_merging_into_another_model_is_refused(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"does not fit the model: blocks\.2.* is not there"):
        merge_adapter(load_components("tiny-ti2v").denoiser.state_dict(), adapter)


def test_the_commands(tmp_path: Path) -> None:
    model, _ = make_adapter(tmp_path / "trained", 8)
    trained, run = str(tmp_path / "trained"), CliRunner().invoke
    comfy = tmp_path / "out" / "comfy.safetensors"
    result = run(app, ["adapter", "convert", trained, "--to", "comfyui", "--precision", "bf16", "--out", str(comfy)])
    assert result.exit_code == 0, result.output
    assert {tensor.dtype for name, tensor in load_file(comfy).items() if "alpha" not in name} == {torch.bfloat16}
    merged = tmp_path / "merged.safetensors"
    assert run(app, ["adapter", "merge", "tiny", trained, "--precision", "fp32", "--out", str(merged)]).exit_code == 0
    # It is a denoiser as Wan releases them: what is given in a list is loaded.
    tiny = Path(load_components.__code__.co_filename).parent / "tiny" / "weights" / "tiny"
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4}))
    others = [
        tiny / "Wan2.1_VAE.safetensors",
        tiny / "models_t5_umt5-xxl-enc.safetensors",
        tiny / "google" / "umt5-xxl",
    ]
    loaded = load_components([merged, *others]).denoiser
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "{adapter}", "--to", "kohya", "--out", "x.safetensors"], "unknown spelling 'kohya'"),
        (["convert", "{adapter}", "--to", "comfyui", "--out", "folder"], "one .safetensors file"),
        (["convert", "nowhere", "--to", "peft", "--out", "folder"], "nowhere holds no adapter"),
        (["merge", "tiny", "{adapter}", "--out", "x.bin"], "written as .safetensors"),
        (["merge", "tiny", "{adapter}", "--precision", "int8", "--out", "x.safetensors"], "unknown precision 'int8'"),
        (["merge", "nowhere", "{adapter}", "--out", "x.safetensors"], "nowhere is no folder"),
    ],
)
def test_mistakes_at_the_command_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    make_adapter(tmp_path / "trained", 4)
    filled = [argument.format(adapter=tmp_path / "trained") for argument in arguments]
    result = CliRunner().invoke(app, ["adapter", *filled])
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)


def test_an_adapter_of_another_kind_of_model_is_not_converted(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "trained", 6)
    strange = replace(adapter, layers={"down_blocks.0.attn": next(iter(adapter.layers.values()))})
    with pytest.raises(ConfigError, match=r"has the layer down_blocks\.0\.attn, which Wan's denoiser has not"):
        write_adapter(strange, "diffusers", tmp_path / "lora.safetensors")


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    make_adapter(tmp_path, 4)
    command = ["adapter", "convert", str(tmp_path), "--to", "comfyui", "--out", "/proc/x.safetensors"]
    merge = [
        "adapter",
        "merge",
        "tiny",
        str(tmp_path),
        "--out",
        str(tmp_path / "adapter_config.json" / "x.safetensors"),
    ]
    for arguments in (command, merge):
        error = CliRunner().invoke(app, arguments).exception
        assert isinstance(error, DataError)
        assert "x.safetensors: cannot be written: " in str(error)
