"""Adapters read from disk, of every program: which layers they change, by how much, and which are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import make_adapter, output, tiny_denoiser, uneven, with_alpha, write_diffusers
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.lora import merge_adapter, read_adapter, write_adapter
from frostline.models.lora.inject import load_adapter, lora_layers


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_the_scale_in_a_file_of_diffusers_counts(prefix: str, tmp_path: Path) -> None:
    """Read the config under the denoiser's name, as in files of a pipeline, or under none, as in files of a model."""
    model, adapter = make_adapter(tmp_path / "trained", 6)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_diffusers(path, adapter, prefix)
    assert {pair.alpha for pair in read_adapter(path).layers.values()} == {6}
    fresh = tiny_denoiser()
    load_adapter(fresh, path)
    assert torch.equal(output(fresh), output(model))


STATED: dict[str, tuple[dict[str, Any], str]] = {
    "rank-stabilised": ({"use_rslora": True}, "use_rslora is not supported"),
    "magnitudes": ({"use_dora": True}, "use_dora is not supported"),
    "a rank of its own that the file has not": (
        {"rank_pattern": {"to_q": 9}},
        r"has rank 4, but .* states 9 \(.*to_q\)",
    ),
    "a pattern that is none": ({"rank_pattern": {"to_q[": 9}}, "cannot be read"),
    "ranks in a list": ({"rank_pattern": [9]}, "rank_pattern must be a mapping"),
    "tokens that switch it on": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is not supported"),
    "a changed base": ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    "another rank": ({"r": 8}, "has rank 4, but .* states 8"),
    "fewer layers": ({"target_modules": ["to_q"]}, r"does not target blocks\.0\.attn1\.to_k"),
    "another method": ({"peft_type": "IA3"}, "is not a LoRA config"),
}


@pytest.mark.parametrize("fault", STATED)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments", "ignore:aLoRA is currently")
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
    with pytest.raises(ConfigError, match=r"scale in its \.alpha tensors and another in lora_adapter_metadata"):
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
    """Read `diffusion_model.` with the matrix names A and B, and without alpha."""
    model, adapter = make_adapter(tmp_path / "trained", 4)
    tensors = {}
    for layer, pair in adapter.layers.items():
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = pair.down
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = pair.up
    save_file(tensors, tmp_path / "other.safetensors")
    fresh = tiny_denoiser()
    load_adapter(fresh, tmp_path / "other.safetensors")
    assert torch.equal(output(fresh), output(model))


def test_the_weights_of_a_folder_mean_the_folder(tmp_path: Path) -> None:
    make_adapter(tmp_path, 6)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert {pair.scale for pair in read_adapter(path).layers.values()} == {1.5}


def test_a_peft_folder_with_the_names_of_diffusers_is_read(tmp_path: Path) -> None:
    model, adapter = make_adapter(tmp_path / "trained", 8, target_modules=("self_attn.q", "ffn.2"))
    write_adapter(with_alpha(adapter, 4), "diffusers", tmp_path / "diffusers.safetensors")
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
    """Read and write an adapter of some layers, whatever setting of PEFT selected them."""
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


FAULTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no LoRA": (
        {"blocks.0.self_attn.q.weight": torch.zeros(2, 2)},
        "contains tensors other than those of a LoRA.*: blocks.0.self_attn.q",
    ),
    "nothing": ({}, "incomplete LoRA"),
    "one matrix": ({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 2)}, r"A or B of blocks\.0\.ffn\.0 is missing"),
    "an alpha of nothing": (
        {
            **{f"blocks.0.ffn.0.lora_{kind}.weight": torch.ones(2, 2) for kind in "AB"},
            "blocks.0.ffn.2.alpha": torch.ones(()),
        },
        r"blocks\.0\.ffn\.2 has an alpha or a bias, but no",
    ),
    "that do not fit": (
        {"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 2), "blocks.0.ffn.0.lora_B.weight": torch.zeros(2, 3)},
        "have incompatible shapes",
    ),
    "of other dimensions": (
        {"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 2), "blocks.0.ffn.0.lora_B.weight": torch.zeros(2, 2, 1, 1)},
        "have incompatible shapes",
    ),
    "whole numbers": ({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 2, dtype=torch.int8)}, r"is torch\.int8"),
    "the same twice": (
        {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 2), "blocks.0.ffn.0.lora_down.weight": torch.ones(2, 2)},
        r"contains blocks\.0\.ffn\.0 twice",
    ),
    "both ways at once": (
        {
            **{f"blocks.0.ffn.0.lora_{kind}.weight": torch.ones(2, 2) for kind in "AB"},
            "blocks.0.ffn.0.diff": torch.ones(2, 2),
        },
        r"has both matrices and a difference of blocks\.0\.ffn\.0",
    ),
    "no change at all": ({"blocks.0.ffn.0.diff": torch.zeros(2, 2)}, "has no effect: .* all of them are zero"),
    "only a text encoder": (
        {f"lora_te_blocks_0.lora_{k}.weight": torch.ones(2, 2) for k in ("up", "down")},
        "incomplete",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused(fault: str, tmp_path: Path) -> None:
    tensors, said = FAULTS[fault]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match=said) as error:
        read_adapter(tmp_path / "lora.safetensors")
    assert "lora.safetensors" in str(error.value)


OTHER_WAYS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector.default.weight": "DoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "oft_blocks": "OFT",
    "lora_mid.weight": "third matrix",
    "reshape_weight": "weights of another shape",
    "weight": "other than those of a LoRA",
}


@pytest.mark.parametrize("leaf", OTHER_WAYS)
def test_other_ways_of_adapting_are_refused_by_name(leaf: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {f"diffusion_model.blocks.0.ffn.0.lora_{kind}.weight": torch.ones(2, 2) for kind in "AB"}
    save_file({**tensors, f"diffusion_model.blocks.0.ffn.0.{leaf}": torch.ones(2)}, path)
    with pytest.raises(ConfigError, match=rf"contains .*{OTHER_WAYS[leaf]}.*{leaf}"):
        read_adapter(path)


STAND_INS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"<!DOCTYPE html><html>401</html>",
    "a text file that begins with 'Invalid": b"Invalid username or password.",
    "an AppleDouble file of macOS": b"\0\5\26\7" + bytes(100),
    "empty": b"",
    "a ZIP archive": b"PK\3\4" + bytes(100),
}


@pytest.mark.parametrize("kind", STAND_INS)
def test_what_is_no_adapter_is_named(kind: str, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(STAND_INS[kind])
    with pytest.raises(ConfigError, match=rf"lora\.safetensors cannot be read: it is {kind}"):
        read_adapter(tmp_path / "lora.safetensors")


def test_patterns_of_peft_count(tmp_path: Path) -> None:
    """Use separate ranks and alphas for some layers, as PEFT does."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q", "k", "ffn.2"],
        init_lora_weights=False,
        rank_pattern={"blocks.1.self_attn.q": 2, "ffn.2": 3},
        alpha_pattern={r"blocks\.\d+\.cross_attn\.k": 5},
    )
    peft = PeftModel(tiny_denoiser(), config)
    peft.save_pretrained(str(tmp_path / "peft"))
    adapter = read_adapter(tmp_path / "peft")
    assert {adapter.layers["blocks.1.self_attn.q"].rank, adapter.layers["blocks.0.ffn.2"].rank} == {2, 3}
    assert adapter.layers["blocks.3.cross_attn.k"].alpha == 5
    expected = output(peft.get_base_model())
    fresh = tiny_denoiser()
    load_adapter(fresh, tmp_path / "peft")
    torch.testing.assert_close(output(fresh), expected, atol=1e-5, rtol=1e-5)


def test_one_rank_and_alpha_for_all_layers_compute_the_same(tmp_path: Path) -> None:
    """Pad lower ranks with zeros; multiply different scales into B, but keep a common one."""
    adapter = uneven(make_adapter(tmp_path / "trained", 4)[1])
    lora = adapter.uniform()
    assert (lora.rank, lora.alpha) == (4, 4)
    for layer, (down, up) in lora.layers.items():
        torch.testing.assert_close(up @ down, adapter.layers[layer].delta(), atol=1e-7, rtol=1e-6)
    even = with_alpha(make_adapter(tmp_path / "again", 6)[1], 6)
    assert (even.uniform().rank, even.uniform().alpha) == (4, 6)
    assert all(even.uniform().layers[layer][1] is pair.up for layer, pair in even.layers.items())
    write_adapter(adapter, "comfyui", tmp_path / "uneven.safetensors")
    fresh, merged = tiny_denoiser(), tiny_denoiser()
    load_adapter(fresh, tmp_path / "uneven.safetensors")
    merged.load_state_dict(merge_adapter(merged.state_dict(), adapter))
    torch.testing.assert_close(output(fresh), output(merged), atol=1e-5, rtol=1e-5)
