"""HPS v2's file, which has open_clip's names, and the file of an aesthetic predictor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from vision_files import IMAGE_SIZE, open_clip_state, write_aesthetic, write_hpsv2

from frostline.errors import ConfigError
from frostline.models.vision.aesthetic import load_predictor
from frostline.models.vision.hpsv2 import clean_text, load_hpsv2, to_transformers


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    file = tmp_path_factory.mktemp("hpsv2") / "HPS_v2.1_compressed.pt"
    return file, write_hpsv2(file)


@pytest.mark.parametrize("form", ["the release", "tensors alone", "half", "safetensors", "of a wrapped module"])
def test_both_towers_are_those_of_the_file(form: str, written: tuple[Path, Any], tmp_path: Path) -> None:
    file, model = written
    state = open_clip_state(model)
    if form == "safetensors":
        file = tmp_path / "hps.safetensors"
        save_file(state, file)
    elif form != "the release":
        file = tmp_path / "hps.pt"
        if form == "half":
            state = {name: tensor.half() for name, tensor in state.items()}
        prefix = "module." if form == "of a wrapped module" else ""
        torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, file)
    own = load_hpsv2(file, written[0].parent)
    pixels, tokens = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), own.tokens(["a person", "cat " * 30])
    atol = 1e-2 if form == "half" else 1e-5
    image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)
    text = F.normalize(model.get_text_features(input_ids=tokens).pooler_output, dim=1)
    torch.testing.assert_close(own.image(pixels), image, atol=atol, rtol=0)
    torch.testing.assert_close(own.text(tokens), text, atol=atol, rtol=0)
    assert own.image(pixels).dtype == torch.float32
    assert own.scale == 1, "HPSv2's script returns the cosine without a scale"


def test_every_tensor_has_its_place(written: tuple[Path, Any]) -> None:
    model = written[1]
    renamed = to_transformers(open_clip_state(model))
    expected = model.state_dict()
    assert renamed.keys() == expected.keys()
    assert all(torch.equal(renamed[name], tensor) for name, tensor in expected.items())


def less(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(name)


def more(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: torch.zeros(3)})


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "no images": (less("visual.conv1.weight"), "is not a checkpoint of HPS v2: it has no tensor 'visual.conv1.weight'"),
    "a bias less": (
        less("transformer.resblocks.1.ln_2.bias"),
        "it has no text_model.encoder.layers.1.layer_norm2.bias",
    ),
    "no qkv": (less("visual.transformer.resblocks.0.attn.in_proj_weight"), "it has no vision_model.encoder.layers.0."),
    "a tensor more": (
        more("score_predictor.weight"),
        "has tensors that CLIPModel does not have: score_predictor.weight",
    ),
    "in a block": (more("transformer.resblocks.0.ls_1.gamma"), "does not have: transformer.resblocks.0.ls_1.gamma"),
    "another shape": (more("visual.ln_pre.bias"), "vision_model.pre_layrnorm.bias has shape (3,)"),
    "another size": (
        lambda state: state.update({"text_projection": torch.zeros(64, 48)}),
        "widths of 80, 64 and 48 are not those of a ViT-H/14",
    ),
    "no matrix": (
        lambda state: state.update({"token_embedding.weight": torch.zeros(3)}),
        "is not a checkpoint of HPS v2",
    ),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_other_checkpoints_are_refused(
    damage: Callable[[dict[str, Tensor]], None], message: str, written: tuple[Path, Any], tmp_path: Path
) -> None:
    state, file = open_clip_state(written[1]), tmp_path / "hps.pt"
    damage(state)
    torch.save({"state_dict": state}, file)
    with pytest.raises(ConfigError) as caught:
        load_hpsv2(file, written[0].parent)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


class Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return print, ("code ran",)


@pytest.mark.parametrize("content", [{"state_dict": Code()}, [1, 2], None], ids=["code", "a list", "damaged"])
def test_no_file_runs_code(
    content: Any, written: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hps.pt"
    file.write_bytes(b"nothing") if content is None else torch.save(content, file)
    for load in (lambda: load_hpsv2(file, written[0].parent), lambda: load_predictor(file, 24)):
        with pytest.raises(ConfigError, match=r"hps\.pt cannot be read"):
            load()
    assert "code ran" not in capsys.readouterr().out


def test_texts_are_cleaned_as_open_clip_does() -> None:
    assert clean_text("  a cat &amp;amp; a dog ") == "a cat & a dog"
    assert clean_text("cafÃ©") == "café"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_predictor(suffix: str, tmp_path: Path) -> None:
    layers = write_aesthetic(tmp_path / "predictor.pth")
    file = tmp_path / f"predictor{suffix}"
    if suffix == ".safetensors":
        save_file({f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}, file)
    own = load_predictor(file, 24)
    embeddings = F.normalize(torch.randn(2, 5, 24), dim=2)
    torch.testing.assert_close(own(embeddings), layers(embeddings))
    assert not own.training
    with pytest.raises(ConfigError, match="is not an aesthetic predictor for 32-dimensional embeddings"):
        load_predictor(file, 32)
    torch.save({"weight": torch.zeros(1, 24), "bias": torch.zeros(1)}, tmp_path / "linear.pth")
    with pytest.raises(ConfigError, match="is not an aesthetic predictor"):
        load_predictor(tmp_path / "linear.pth", 24)
