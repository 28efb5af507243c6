"""Preprocessing of pictures compared with transformers' processors and HPSv2's transform, and its gradient."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BitImageProcessor, CLIPImageProcessor
from vision_files import CLIP_MEAN, CLIP_STD

from frostline.errors import ConfigError
from frostline.models.vision.letterbox import Letterbox
from frostline.models.vision.preparation import PREPARATION_FILE, Preparation

SIZES = {
    "landscape": (64, 97),
    "portrait": (121, 60),
    "square": (96, 96),
    "the crop itself": (28, 28),
    "smaller": (17, 23),
    "a line": (1, 40),
    "odd": (33, 29),
}
PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (CLIPImageProcessor, {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}),
    "dinov2": (BitImageProcessor, {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}),
    "a crop larger than the picture": (
        CLIPImageProcessor,
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 28, "width": 28}, "resample": 2},
    ),
}
ONE_LEVEL = 1 / 255 / 0.22


def pictures(height: int, width: int, seed: int = 0) -> Tensor:
    """Return two uint8 pictures: one of noise, one smooth."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, 3, height, width, generator=generator)
    smooth = F.interpolate(torch.rand(1, 3, 5, 5, generator=generator), (height, width), mode="bicubic").clamp(0, 1)
    return (torch.cat([noise, smooth]) * 255).round().byte()


def assert_prepared_alike(actual: Tensor, expected: Tensor) -> None:
    """Compare within 1e-3, except for a few pixels half way between two levels, which may be rounded either way."""
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    difference = (actual - expected).abs()
    assert difference.max() <= 1.01 * ONE_LEVEL
    assert (difference > 1e-3).float().mean() <= 0.02


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_pixels_are_those_of_the_processor(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    kind, options = PROCESSORS[name]
    processor = kind(**options)
    processor.save_pretrained(tmp_path)
    prepare, images = Preparation.read(tmp_path), pictures(*size)
    expected = processor(images=list(images), return_tensors="pt")["pixel_values"]
    assert_prepared_alike(prepare(images.float() / 255), expected)
    # 11 bits of mantissa distinguish 256 levels.
    assert torch.equal(prepare((images.float() / 255).half()), prepare(images.float() / 255))


# transformers cannot resize to a single pixel.
@settings(max_examples=20, deadline=None)
@given(height=st.integers(2, 90), width=st.integers(2, 90), crop=st.integers(2, 40), shortest=st.integers(2, 40))
def test_any_size_is_prepared_as_the_processor_does(height: int, width: int, crop: int, shortest: int) -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": shortest}, crop_size={"height": crop, "width": crop})
    images = pictures(height, width)[1:]
    prepared = Preparation(shortest, crop, CLIP_MEAN, CLIP_STD)(images.float() / 255)
    expected = processor(images=list(images), return_tensors="pt")["pixel_values"]
    difference = (prepared - expected).abs()
    assert prepared.shape == expected.shape
    # A tie that the first of the two passes rounds differently can count twice after the second pass, which sharpens.
    assert difference.max() <= 2.02 * ONE_LEVEL
    assert (difference > 1.01 * ONE_LEVEL).float().mean() <= 0.05


def test_the_gradient_is_that_of_the_resize_without_rounding() -> None:
    frames = torch.rand(2, 3, 40, 52, requires_grad=True)
    weight = torch.randn(2, 3, 28, 28)
    (Preparation(28, 28, CLIP_MEAN, CLIP_STD)(frames) * weight).sum().backward()
    plain = frames.detach().clone().requires_grad_()
    resized = F.interpolate(plain, (40, 36), mode="bicubic", antialias=True)
    resized = F.interpolate(resized, (28, 36), mode="bicubic", antialias=True)[..., 4:32]
    (
        (resized - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None] * weight
    ).sum().backward()
    assert frames.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(frames.grad, plain.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_letterbox_is_that_of_hpsv2(size: tuple[int, int]) -> None:
    from torchvision.transforms.v2 import functional as transforms

    images = pictures(*size)
    prepared = Letterbox(28, CLIP_MEAN, CLIP_STD)(images.float() / 255)
    # Pad like its ResizeMaxSize, and also pad pictures whose longest side needs no resizing, unlike ResizeMaxSize.
    scale = 28 / max(size)
    rows, columns = (round(extent * scale) for extent in size)
    rows, columns = max(1, rows), max(1, columns)
    resized = transforms.resize(
        images.float() / 255, [rows, columns], transforms.InterpolationMode.BICUBIC, antialias=True
    )
    below, right = 28 - rows, 28 - columns
    padded = transforms.pad(resized, [right // 2, below // 2, right - right // 2, below - below // 2])
    torch.testing.assert_close(prepared, transforms.normalize(padded, CLIP_MEAN, CLIP_STD), atol=1e-5, rtol=0)


GOOD = {"size": 28, "crop_size": 28, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
REFUSED: dict[str, tuple[Any, str]] = {
    "no mapping": ([], "must be a mapping"),
    "no size": ({**GOOD, "size": None}, "not supported"),
    "no mean": ({"size": 28, "image_std": CLIP_STD}, "'image_mean' is missing"),
    "grey": ({**GOOD, "image_mean": [0.5]}, "must have 3 values each"),
    "not a square": ({**GOOD, "crop_size": {"height": 28, "width": 30}}, "is not a square"),
    "both sides": ({**GOOD, "size": {"height": 28, "width": 28}}, "'shortest_edge' is missing"),
    "another filter": ({**GOOD, "resample": 1}, "resample 1 is neither 2 (bilinear) nor 3 (bicubic)"),
    "no crop": ({**GOOD, "do_center_crop": False}, "do_center_crop is false"),
    "another scale": ({**GOOD, "rescale_factor": 1 / 127.5}, "is not 1/255"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_other_preparations_are_refused(values: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / PREPARATION_FILE).write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        Preparation.read(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / PREPARATION_FILE) in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), ("{", "preprocessor_config.json: ")])
def test_a_file_that_cannot_be_read_is_told(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / PREPARATION_FILE).write_text(content)
    with pytest.raises(ConfigError, match=message):
        Preparation.read(tmp_path)
