"""Incomplete checkpoints, and files with another content, are refused, and the error says what they are."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    TOKENIZER,
    VARIANTS,
    make_tensors,
    save_shards,
    tiny_tensors,
    tiny_with,
    write_diffusers,
    write_files,
    write_official,
)
from safetensors.torch import load_file, save_file

from frostline.errors import ConfigError
from frostline.models.checkpoints.checkpoint_files import find_files
from frostline.models.checkpoints.loading import load_components
from frostline.models.checkpoints.releases import read_spec

T2V = VARIANTS["Wan2.1-T2V"]


def without(block: int, pattern: str, path: Path) -> None:
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if pattern.format(block) not in name}
    assert len(kept) < len(tensors)
    save_file(kept, path)


def test_the_last_block_is_missing(tmp_path: Path) -> None:
    """A model with fewer blocks would seem complete."""
    tensors = {name: tensor for name, tensor in tiny_tensors().items() if not name.startswith("blocks.3.")}
    folder = tiny_with(tmp_path / "model", tensors)
    for read in (load_components, read_spec):
        with pytest.raises(ConfigError, match=r"incomplete: .*there are 3 blocks, but config\.json states 4"):
            read(folder)
    (folder / "config.json").write_text(json.dumps({"num_layers": 4}))
    with pytest.raises(ConfigError, match=r"there are 3 blocks, but config\.json states 4"):
        find_files(folder)
    (folder / "config.json").write_text(json.dumps({"num_heads": 4}))
    assert find_files(folder).denoiser.config == {"num_heads": 4}  # the number of blocks is not stated


def test_a_block_between_others_is_missing(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in tiny_tensors().items() if not name.startswith("blocks.1.")}
    folder = tiny_with(tmp_path / "model", tensors)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"incomplete: .*block 1 is missing, but there is a block 3"):
        find_files(folder)


@pytest.mark.parametrize(
    ("part", "config", "pattern"),
    [
        ("text_encoder", {"model_type": "umt5", "num_layers": 2}, "encoder.block.{}."),
        ("image_encoder", {"model_type": "clip_vision_model", "num_hidden_layers": 2}, "encoder.layers.{}."),
        ("image_encoder", {"model_type": "clip", "vision_config": {"num_hidden_layers": 2}}, "encoder.layers.{}."),
        ("transformer", {"num_layers": 2, "num_attention_heads": 2}, "blocks.{}."),
    ],
    ids=["text encoder", "image encoder", "image encoder of CLIP", "denoiser"],
)
def test_the_config_of_each_part_counts(part: str, config: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    variant = VARIANTS["Wan2.1-I2V"]
    folder = write_diffusers(tmp_path / "Wan", variant, make_tensors(variant))
    (folder / part / "config.json").write_text(json.dumps(config))
    find_files(folder)
    if part == "transformer":
        shards = sorted((folder / part).glob("*.safetensors"))
        whole = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
        for path in (folder / part).glob("*model*"):
            path.unlink()
        save_file(whole, folder / part / "model.safetensors")
    without(1, pattern, folder / part / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"incomplete: .*{part}.*there are 1 blocks, but config\.json states 2"):
        find_files(folder)


def test_shards_may_name_their_variant(tmp_path: Path) -> None:
    """Accept names with a variant before or after the number of the shard, like those of diffusers and transformers."""
    tensors = make_tensors(T2V)
    for number, rename in enumerate(
        (
            lambda name: name.replace(".safetensors", ".fp16.safetensors"),
            lambda name: name.replace("_model-", "_model.fp16-"),
        )
    ):
        folder = write_diffusers(tmp_path / str(number), T2V, tensors)
        for index in (folder / "transformer").glob("*.index.json"):
            index.unlink()
        for path in sorted((folder / "transformer").glob("*.safetensors")):
            path.rename(path.with_name(rename(path.name)))
        assert len(find_files(folder).denoiser.paths) == 2
        loaded = load_components(folder).denoiser.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors["denoiser"].items())
        next((folder / "transformer").glob("*00001-of*")).unlink()
        with pytest.raises(ConfigError, match=r"incomplete: .*00001-of-00002.* is missing"):
            find_files(folder)


def test_an_index_may_name_its_variant(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "Wan", T2V, make_tensors(T2V))
    for path in (folder / "transformer").glob("*.index.json"):
        path.rename(path.with_name(path.name.replace(".index.json", ".index.fp16.json")))
    assert len(find_files(folder).denoiser.paths) == 2
    next((folder / "transformer").glob("*00001-of*")).unlink()
    with pytest.raises(ConfigError, match=r"index\.fp16\.json lists it"):
        find_files(folder)


def test_an_index_that_lists_what_no_shard_has(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "Wan", T2V, make_tensors(T2V))
    (index,) = (folder / "transformer").glob("*.index.json")
    content = json.loads(index.read_text())
    shard = content["weight_map"]["blocks.0.norm2.weight"]
    content["weight_map"]["blocks.2.norm2.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match=r"lists 1 tensors that are in no shard, the first is blocks\.2\.norm2\.weight"
    ):
        find_files(folder)


def test_a_number_beyond_the_count_of_shards(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "Wan", T2V, make_tensors(T2V))
    for path in folder.glob("*.index.json"):
        path.unlink()
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").rename(
        folder / "diffusion_pytorch_model-00003-of-00002.safetensors"
    )
    with pytest.raises(ConfigError, match=r"00002-of-00002\.safetensors is missing"):
        find_files(folder)
    (folder / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"00003-of-00002\.safetensors is not one of 2 shards numbered from 1"):
        find_files(folder)


def test_all_shards_are_listed(tmp_path: Path) -> None:
    listed = list(write_files(tmp_path / "files", T2V, make_tensors(T2V)))
    (shards,) = [entry for entry in listed if isinstance(entry, list)]
    listed.remove(shards)
    find_files([shards, *listed])
    for some in (shards[:1], shards[1], str(shards[0])):
        with pytest.raises(
            ConfigError, match=r"is one of several shards, but .*-of-00002\.safetensors is not in the list"
        ):
            find_files([some, *listed])


def test_a_tensor_in_two_files_of_a_network_is_refused(tmp_path: Path) -> None:
    paths = save_shards(tiny_tensors(), tmp_path, "wan", index=False)
    shutil.copy(paths[0], tmp_path / "copy.safetensors")
    with pytest.raises(ConfigError, match="is also in another file of the same network"):
        find_files([[*paths, tmp_path / "copy.safetensors"], TOKENIZER])


STAND_INS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"\n<!DOCTYPE html><html>401 Unauthorized</html>",
    "a text file that begins with 'Entry not found'": b"Entry not found",
    "empty": b"",
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", STAND_INS)
def test_a_file_that_is_something_else_is_named(kind: str, suffix: str, tmp_path: Path) -> None:
    folder = tiny_with(tmp_path / "model", tiny_tensors())
    path = folder / f"Wan2.1_VAE{suffix}"
    path.write_bytes(STAND_INS[kind])
    for model in (folder, [path, TOKENIZER]):
        with pytest.raises(ConfigError, match=rf"Wan2\.1_VAE{suffix} cannot be read: it is {kind}"):
            find_files(model)


def test_a_tokenizer_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    folder = tiny_with(tmp_path / "model", tiny_tensors())
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_bytes(STAND_INS["a Git LFS pointer"])
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read: it is a Git LFS pointer"):
        load_components(folder)


def test_what_macos_keeps_beside_a_file_is_no_weights(tmp_path: Path) -> None:
    folder = tiny_with(tmp_path / "model", tiny_tensors())
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"):
        (folder / f"._{name}").write_bytes(b"\0\5\26\7" + bytes(4092))
    loaded = load_components(folder).denoiser.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in tiny_tensors().items())
    with pytest.raises(ConfigError, match=r"it is an AppleDouble file of macOS"):
        find_files([folder / "._diffusion_pytorch_model.safetensors", TOKENIZER])
