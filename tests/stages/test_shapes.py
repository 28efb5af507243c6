"""Shapes on the command line, and the resulting range."""

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.errors import ConfigError
from frostline.stages.shapes import Range, ShapeRange, parse_shapes

NAMES = [dimension.name for dimension in fields(ShapeRange)]


@pytest.mark.parametrize(
    ("low", "typical", "high", "expected"),
    [
        ("", "", "", {}),
        (
            "video:1x5x3x64x64",
            "video:2x9x3x96x128",
            "video:4x17x3x256x512",
            {"batch": (1, 2, 4), "latent_frames": (2, 3, 5), "height": (64, 96, 256), "width": (64, 128, 512)},
        ),
        ("video:1x1x3x32x32", "", "", {"latent_frames": (1, 3, 32), "height": (32, 96, 1024)}),
        (
            "video:4x17x3x128x112",
            "",
            "",
            {"batch": (4, 4, 32), "latent_frames": (5, 5, 32), "height": (128, 128, 1024), "width": (112, 112, 1024)},
        ),
        (
            "",
            "",
            "video:1x5x3x16x48",
            {"batch": (1, 1, 1), "latent_frames": (1, 2, 2), "height": (16, 16, 16), "width": (32, 48, 48)},
        ),
        (
            "",
            "video:64x201x3x16x2048",
            "",
            {"batch": (1, 64, 64), "latent_frames": (1, 51, 51), "height": (16, 16, 1024), "width": (32, 2048, 2048)},
        ),
        ("video:40x5x3x2048x64", "", "", {"batch": (40, 40, 40), "latent_frames": (2, 3, 32), "height": (2048,) * 3}),
        ("", "", "faces:9x3x112x112", {"faces": (1, 9, 9)}),
        ("", "images:18x3x224x224", "", {"images": (1, 18, 32)}),
        (
            "",
            "frames:9x3x70x50",
            "",
            {"faces": (1, 9, 2048), "face_height": (12, 70, 4096), "face_width": (12, 50, 4096)},
        ),
        (
            "video:2x5x3x64x64,frames:3x3x24x24",
            "",
            "",
            {"batch": (2, 2, 32), "faces": (3, 18, 2048), "face_height": (24, 64, 4096)},
        ),
        (" video: 2x5x3x64x64 ,", "", "", {"batch": (2, 2, 32)}),
    ],
)
def test_shapes_are_read(low: str, typical: str, high: str, expected: dict[str, Range]) -> None:
    shapes = parse_shapes(low, typical, high)
    for name, extents in expected.items():
        assert getattr(shapes, name) == extents, name
    unnamed = set(NAMES) - expected.keys() if not (low or typical or high) else {"rank"}
    for name in unnamed:
        assert getattr(shapes, name) == getattr(ShapeRange(), name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"min_shapes": "clip:1x5x3x64x64"},
            "--min-shapes: unknown tensor 'clip'; valid names: video, faces, frames, im",
        ),
        ({"opt_shapes": "1x5x3x64x64"}, "--opt-shapes: unknown tensor '1x5x3x64x64'"),
        ({"max_shapes": "video"}, "--max-shapes: 'video' is not in the form video:batchxframesx3xheightxwidth"),
        ({"max_shapes": "video:1x5x3x64"}, "--max-shapes: video has 5 dimensions"),
        ({"max_shapes": "video:1x5x3x64x64x64"}, "video has 5 dimensions"),
        ({"max_shapes": "video:1x5x3x64x-64"}, "is not in the form"),
        ({"max_shapes": "video:1x5x3x64xhigh"}, "is not in the form"),
        ({"max_shapes": "video:1x5x3x6.4x64"}, "is not in the form"),
        ({"max_shapes": "video:1x3x5x64x64"}, "4k \\+ 1 frames, not 3"),
        ({"max_shapes": "video:1x5x4x64x64"}, "4 must be 3"),
        ({"max_shapes": "video:1x8x3x64x64"}, "4k \\+ 1 frames, not 8"),
        ({"max_shapes": "video:1x0x3x64x64"}, "4k \\+ 1 frames, not 0"),
        ({"max_shapes": "faces:1x1x112x112"}, "1 must be 3"),
        ({"max_shapes": "video:1x5x3x72x64"}, "height 72 is not a multiple of 16"),
        ({"max_shapes": "video:1x5x3x64x72"}, "width 72 is not a multiple of 16"),
        ({"max_shapes": "video:0x5x3x64x64"}, "batch must satisfy 1 <= min <= opt <= max"),
        ({"min_shapes": "video:2x5x3x64x64", "max_shapes": "video:1x5x3x64x64"}, "batch must satisfy.*2, 1, 1|2, 2, 1"),
        ({"min_shapes": "video:1x5x3x96x64", "opt_shapes": "video:1x5x3x64x64"}, "height must satisfy.*96, 64"),
        ({"opt_shapes": "video:1x9x3x64x64", "max_shapes": "video:1x5x3x64x64"}, "latent_frames must satisfy"),
    ],
)
def test_what_is_wrong_is_said(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_shapes(**flags)


EXTENTS = {"batch": st.integers(1, 100), "latent": st.integers(1, 100), "blocks": st.integers(1, 200)}
VIDEOS = st.tuples(EXTENTS["batch"], EXTENTS["latent"], EXTENTS["blocks"], EXTENTS["blocks"])
FRAMES = st.tuples(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096))


def spelled(video: tuple[int, ...] | None, frames: tuple[int, ...] | None) -> str:
    parts = []
    if video is not None:
        batch, latent, height, width = video
        parts.append(f"video:{batch}x{4 * (latent - 1) + 1}x3x{16 * height}x{16 * width}")
    if frames is not None:
        count, height, width = frames
        parts.append(f"frames:{count}x3x{height}x{width}")
    return ",".join(parts)


@st.composite
def flags(draw: st.DrawFn) -> dict[str, str]:
    """Draw each option or not; if several options name a tensor, min <= opt <= max."""

    def ordered(shapes: st.SearchStrategy[tuple[int, ...]]) -> list[tuple[int, ...] | None]:
        three = [draw(shapes) for _ in range(3)]
        columns = [sorted(column) for column in zip(*three, strict=True)]
        return [shape if draw(st.booleans()) else None for shape in zip(*columns, strict=True)]

    videos, frames = ordered(VIDEOS), ordered(FRAMES)
    names = ("min_shapes", "opt_shapes", "max_shapes")
    return {name: spelled(v, f) for name, v, f in zip(names, videos, frames, strict=True)}


@given(flags())
@settings(max_examples=500, deadline=None)
def test_valid_shapes_give_an_ordered_range_that_holds_them(flags: dict[str, str]) -> None:
    shapes = parse_shapes(**flags)
    for name in NAMES:
        low, typical, high = getattr(shapes, name)
        assert 1 <= low <= typical <= high
    for position, flag in enumerate(("min_shapes", "opt_shapes", "max_shapes")):
        for part in filter(None, flags[flag].split(",")):
            tensor, _, shape = part.partition(":")
            extents = [int(extent) for extent in shape.split("x")]
            names = ("faces", "", "face_height", "face_width")
            if tensor == "video":
                names = ("batch", "latent_frames", "", "height", "width")
                extents[1] = (extents[1] - 1) // 4 + 1
            for name, extent in zip(names, extents, strict=True):
                assert not name or getattr(shapes, name)[position] == extent


def test_dimensions_of_tensors() -> None:
    shapes = parse_shapes("video:1x5x3x64x64", "video:2x9x3x96x96", "video:4x17x3x128x160")
    height = shapes.pixels("height", 16, 16)
    assert [height.at(size) for size in ("min", "opt", "max")] == [64, 96, 128]
    assert height.admits(112)
    assert not height.admits(104)
    assert not height.admits(144)
    latent = shapes.pixels("width", 2, 16)
    assert [latent.at(size) for size in ("min", "opt", "max")] == [8, 12, 20]
    assert (latent.name, latent.min, latent.max) == ("width", 4, 10)
    batch = shapes.dimension("batch")
    assert [batch.at(size) for size in ("min", "opt", "max")] == [1, 2, 4]
    assert shapes.dimension("latent_frames").at("opt") == 3


def test_a_model_that_wants_multiples_of_32() -> None:
    shapes = parse_shapes("video:1x5x3x64x64", "video:2x9x3x96x96", "video:4x17x3x128x160")
    latent = shapes.pixels("height", 2, 32)
    assert [latent.at(size) for size in ("min", "opt", "max")] == [4, 6, 8]
    with pytest.raises(ConfigError, match="width 48 is not a multiple of 32, as this model requires"):
        parse_shapes("video:1x5x3x64x48").pixels("width", 32, 32)


@pytest.mark.parametrize("extents", [(0, 1, 2), (2, 1, 3), (1, 3, 2)])
def test_an_unordered_range_is_refused(extents: Range) -> None:
    with pytest.raises(ConfigError, match="rank must satisfy 1 <= min <= opt <= max"):
        ShapeRange(rank=extents)
