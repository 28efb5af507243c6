"""CLIP's towers and DINOv2 compared with transformers' models: values, gradients, and refused files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from vision_files import IMAGE_SIZE, TOKENS, write_clip, write_dinov2

from frostline.errors import ConfigError
from frostline.models.vision.clip import Clip, TextTower, load_clip
from frostline.models.vision.dinov2 import load_dinov2

TEXTS = ("a person on persons", "", "cat " * 40, "Über <b>café</b>  42!")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Clip]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, write_clip(folder), load_clip(folder)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("dinov2")
    return folder, write_dinov2(folder)


def assert_equal_with_gradient(
    own: Callable[[Tensor], Tensor], others: Callable[[Tensor], Tensor], pixels: Tensor
) -> None:
    weight, results = None, []
    for network in (own, others):
        x = pixels.clone().requires_grad_()
        features = network(x)
        weight = torch.randn_like(features) if weight is None else weight
        (features * weight).sum().backward()
        assert x.grad is not None
        results.append((features.detach(), x.grad))
    (actual, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert expected_gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


def test_the_image_tower(clip: tuple[Path, Any, Clip]) -> None:
    _, model, own = clip
    assert (own.image.image_size, own.image.dim) == (IMAGE_SIZE, 24)
    assert not any(parameter.requires_grad for parameter in own.image.parameters())

    def expected(pixels: Tensor) -> Tensor:
        return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)

    assert_equal_with_gradient(own.image, expected, torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE))


@pytest.mark.parametrize("old", [False, True], ids=["an end token", "a configuration from before 4.31"])
def test_the_text_tower(old: bool, clip: tuple[Path, Any, Clip], tmp_path: Path) -> None:
    folder, model, own = clip
    tokens = own.tokens(TEXTS)
    assert tokens.shape == (4, TOKENS)
    assert (tokens == own.text.end).any(dim=1).all()
    tower = own.text
    if old:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        values = json.loads((tmp_path / "config.json").read_text())
        values["text_config"]["eos_token_id"] = 2
        (tmp_path / "config.json").write_text(json.dumps(values))
        tower = load_clip(tmp_path).text
        assert tower.end is None
    expected = F.normalize(model.get_text_features(input_ids=tokens).pooler_output, dim=1)
    torch.testing.assert_close(tower(tokens), expected, atol=1e-5, rtol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_what_pads_a_text_changes_nothing(clip: tuple[Path, Any, Clip]) -> None:
    """Ignore the padding: open_clip pads with token 0, transformers with the end token."""
    own = clip[2]
    tokens = own.tokens(TEXTS[:2])
    ends = (tokens == own.text.end).int().argmax(dim=1, keepdim=True)
    zeros = torch.where(torch.arange(TOKENS) > ends, 0, tokens)
    assert (zeros != tokens).any()
    torch.testing.assert_close(own.text(zeros), own.text(tokens))


def test_tokens_are_those_of_the_library(clip: tuple[Path, Any, Clip]) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip[0])
    for text, row in zip(TEXTS, clip[2].tokens(TEXTS).tolist(), strict=True):
        expected = tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"]
        assert row[: len(expected)] == expected
        assert len(expected) <= TOKENS
    assert tokenizer("a cat")["input_ids"] != tokenizer("a person")["input_ids"]


def test_dinov2_at_a_size_that_it_was_not_trained_at(dinov2: tuple[Path, Any]) -> None:
    folder, model = dinov2
    own, prepare = load_dinov2(folder)
    assert (own.image_size, own.dim, prepare.crop, prepare.shortest) == (IMAGE_SIZE, 32, IMAGE_SIZE, 32)

    def expected(pixels: Tensor) -> Tensor:
        return F.normalize(model(pixel_values=pixels).last_hidden_state[:, 0], dim=1)

    assert_equal_with_gradient(own, expected, torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precisions_take_and_return_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    write_dinov2(tmp_path / "dinov2")
    clip, (dinov2, _) = load_clip(tmp_path / "clip"), load_dinov2(tmp_path / "dinov2")
    pixels, tokens = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), clip.tokens(TEXTS[:2])
    for network, value in ((clip.image, pixels), (clip.text, tokens), (dinov2, pixels)):
        expected = network(value)
        actual = network.to(dtype)(value)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.norm(dim=1), torch.ones(2))
        assert F.cosine_similarity(actual, expected).min() > 0.99


def test_an_end_is_found_though_it_is_not_the_largest_token(clip: tuple[Path, Any, Clip]) -> None:
    own: TextTower = clip[2].text
    assert own.end is not None
    tokens = torch.randint(0, own.end, (1, TOKENS))
    tokens[0, 4] = own.end
    after = tokens.clone()
    after[0, 5:] = own.end
    torch.testing.assert_close(own(tokens), own(after))


# What is wrong with a folder, by name.


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def edited(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def written(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def narrower(tensors: dict[str, Tensor]) -> None:
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"][:4].clone()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), "config.json: no such file; a CLIPModel folder contains it"),
    "no weights": (without("model.safetensors"), "model.safetensors: no such file"),
    "no preparation": (without("preprocessor_config.json"), "preprocessor_config.json: no such file"),
    "no vocabulary": (without("vocab.json"), "has no tokenizer; a CLIP folder contains vocab.json and merges.txt"),
    "no merges": (without("merges.txt"), "has no tokenizer"),
    "another model": (
        written("config.json", '{"model_type": "dinov2"}'),
        "the type in its config.json is 'dinov2', not 'clip'",
    ),
    "no JSON": (written("config.json", "{"), "config.json: "),
    "damaged": (written("model.safetensors", "nothing"), "cannot be loaded as a CLIPModel"),
    "a tensor less": (
        edited(lambda tensors: tensors.__delitem__("text_projection.weight")),
        "is not a complete CLIPModel: it has no text_projection.weight",
    ),
    "another shape": (
        edited(narrower),
        "visual_projection.weight has shape (4, 32), but config.json of this CLIPModel requires",
    ),
    "no tokenizer": (written("vocab.json", "[]"), "has no CLIP tokenizer"),
    "another vocabulary": (
        written("vocab.json", '{"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}'),
        "its tokenizer has 3 tokens, but the model has 521: use the model's own",
    ),
    "a shard less": (
        lambda folder: (without("model.safetensors")(folder), sharded(folder, {"logit_scale": "gone.safetensors"}))[0],
        "cannot be loaded as a CLIPModel",
    ),
}


def sharded(folder: Path, places: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_a_folder_that_is_no_whole_model_is_refused(
    damage: Callable[[Path], None], message: str, clip: tuple[Path, Any, Clip], tmp_path: Path
) -> None:
    shutil.copytree(clip[0], tmp_path, dirs_exist_ok=True)
    if message.startswith("its tokenizer"):
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    damage(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_clip(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_weights_in_several_files(clip: tuple[Path, Any, Clip], tmp_path: Path) -> None:
    shutil.copytree(clip[0], tmp_path, dirs_exist_ok=True)
    tensors, places = load_file(tmp_path / "model.safetensors"), {}
    for number in range(2):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        shard = dict(list(tensors.items())[number::2])
        save_file(shard, tmp_path / name, {"format": "pt"})
        places |= dict.fromkeys(shard, name)
    (tmp_path / "model.safetensors").unlink()
    sharded(tmp_path, places)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    torch.testing.assert_close(load_clip(tmp_path).image(pixels), clip[2].image(pixels))


def test_what_goes_with_the_weights_may_be_elsewhere(clip: tuple[Path, Any, Clip], tmp_path: Path) -> None:
    shutil.copytree(clip[0], tmp_path / "weights")
    (tmp_path / "processor").mkdir()
    for name in ("preprocessor_config.json", "vocab.json", "merges.txt"):
        (tmp_path / "weights" / name).rename(tmp_path / "processor" / name)
    own = load_clip(tmp_path / "weights", tmp_path / "processor")
    assert torch.equal(own.tokens(TEXTS), clip[2].tokens(TEXTS))
    assert own.prepare == clip[2].prepare


def test_a_picture_of_no_whole_number_of_patches(dinov2: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(dinov2[0], tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    values["crop_size"] = {"height": 30, "width": 30}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="the image size 30 is not a multiple of the patch size 14"):
        load_dinov2(tmp_path)
