"""The contact sheet: size, position and colours of the frames, for every dtype and length."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from frostline.errors import DataError
from frostline.report.contact_sheet import SheetRow, contact_sheet


def strip(colour: tuple[float, float, float], frames: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(frames, 3, height, width)


RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def columns_of(image: Image.Image, colour: tuple[int, int, int]) -> int:
    """Return the number of separate frames of one colour in the widest row of the sheet."""
    most = 0
    for y in range(0, image.height, 8):
        runs, inside = 0, False
        for x in range(image.width):
            same = image.getpixel((x, y)) == (*colour, 255)
            runs += same and not inside
            inside = same
        most = max(most, runs)
    return most


def test_sheet_shows_every_strip(tmp_path: Path) -> None:
    rows = [
        SheetRow("a person nods\nface score 0.58 → 0.67", {"truth": strip(RED), "before": strip(GREEN)}),
        SheetRow("a person talks", {"after": strip(BLUE, frames=2)}),
    ]
    path = contact_sheet(rows, tmp_path / "new" / "sheet.png", frame_size=(40, 50))
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGBA"
        frames = [columns_of(image, colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
        alpha = image.getchannel("A")
        assert alpha.getextrema() == (0, 255)
        box = image.getbbox()
        assert box is not None and box[2] == image.width  # the frames end at the right edge
        # The scale is 2: three frames of 50 with gaps of 3, three strips of 40, and space for text.
        assert image.width > 2 * (3 * 50 + 2 * 3)
        assert image.height > 2 * (3 * 40)
    assert frames == [3, 3, 2]


def test_scale(tmp_path: Path) -> None:
    rows = [SheetRow("caption", {"truth": strip(RED)})]
    sizes = []
    for scale in (1, 2, 3):
        with Image.open(contact_sheet(rows, tmp_path / "sheet.png", scale=scale)) as image:
            sizes.append(image.size)
    assert sizes[1][1] == 2 * sizes[0][1]
    assert sizes[2][1] == 3 * sizes[0][1]


def test_default_frame_keeps_the_clips_shape(tmp_path: Path) -> None:
    rows = [SheetRow("", {"": strip(RED, frames=1, height=48, width=80)})]
    with Image.open(contact_sheet(rows, tmp_path / "sheet.png", scale=1)) as image:
        red = [x for x in range(image.width) if image.getpixel((x, image.height - 1)) == (255, 0, 0, 255)]
        assert len(red) == 160


def test_long_clips_show_first_and_last_frame(tmp_path: Path) -> None:
    video = torch.zeros(81, 3, 8, 8)
    video[0], video[80] = torch.tensor(RED)[:, None, None], torch.tensor(BLUE)[:, None, None]
    path = contact_sheet(
        [SheetRow("long", {"after": video})], tmp_path / "sheet.png", frame_size=(20, 20), max_frames=5
    )
    with Image.open(path) as image:
        y = image.height - 20
        assert image.getpixel((image.width - 10, y)) == (0, 0, 255, 255)
        assert columns_of(image, (255, 0, 0)) == 1
        assert columns_of(image, (0, 0, 0)) == 3


def test_floats_and_bytes_look_the_same(tmp_path: Path) -> None:
    video = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    pictures = []
    for frames in (video, video / 255, (video / 255).double(), (video / 255).requires_grad_()):
        pictures.append(contact_sheet([SheetRow("a", {"b": frames})], tmp_path / "sheet.png").read_bytes())
    assert len(set(pictures)) == 1


def test_out_of_range_and_nan_are_clamped(tmp_path: Path) -> None:
    video = torch.full((1, 3, 8, 8), 7.0)
    video[:, 1:] = float("nan")
    with Image.open(contact_sheet([SheetRow("a", {"b": video})], tmp_path / "sheet.png")) as image:
        assert image.getpixel((image.width - 20, image.height - 20)) == (255, 0, 0, 255)


def test_a_long_caption_is_cut_not_drawn_over_the_edge(tmp_path: Path) -> None:
    short, long = (
        contact_sheet([SheetRow(text, {"b": strip(RED)})], tmp_path / f"{len(text)}.png")
        for text in ("a", "long " * 99)
    )
    with Image.open(short) as first, Image.open(long) as second:
        assert first.size == second.size


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        (torch.zeros(3, 16, 16), "must be"),
        (torch.zeros(2, 16, 16, 3), "must be"),
        (torch.zeros(0, 3, 16, 16), "must be"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int32), "uint8 or float"),
    ],
)
def test_bad_frames_are_named(tmp_path: Path, frames: torch.Tensor, problem: str) -> None:
    with pytest.raises(DataError, match=f"strip 'after' of 'a person nods'.*{problem}"):
        contact_sheet([SheetRow("a person nods", {"after": frames})], tmp_path / "sheet.png")


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one strip"):
        contact_sheet([SheetRow("empty", {})], tmp_path / "sheet.png")


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sheet.png"
    path.write_bytes(b"before")

    def fail(self: Image.Image, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(DataError, match=r"sheet\.png: cannot be written: No space left"):
        contact_sheet([SheetRow("a", {"b": strip(RED)})], path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["sheet.png"]  # noqa: PTH208


def test_scores_stand_under_the_frames_with_their_numbers_above(tmp_path: Path) -> None:
    plain, scored = SheetRow("a", {"b": strip(RED)}), SheetRow("a", {"b": strip(RED)}, {"b": [0.5, None, 0.25]})
    sizes = {}
    for name, row in (("plain", plain), ("scored", scored)):
        with Image.open(contact_sheet([row], tmp_path / f"{name}.png", frame_size=(40, 50), scale=1)) as image:
            sizes[name] = image.size
            if name == "scored":
                bottom = image.crop((0, image.height - 18, image.width, image.height)).getchannel("A")
    assert sizes["scored"][0] == sizes["plain"][0] and sizes["scored"][1] == sizes["plain"][1] + 17 + 18
    assert bottom.getextrema()[1] > 0


def test_scores_of_another_number_of_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 scores for 3 frames"):
        contact_sheet([SheetRow("a", {"b": strip(RED)}, {"b": [0.5, 0.5]})], tmp_path / "sheet.png")
