"""Read pictures and animations with Pillow: PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, HEIC."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from frostline.errors import DataError

from .info import VideoInfo, check_size
from .orientation import BY_EXIF, UPRIGHT, Orientation, rotation_degrees, upright

HEAD_BYTES = 64
"""Number of bytes at the start of a file that determine its format."""

_EXIF_ORIENTATION = 0x0112
_NEW_SUBFILE_TYPE = 0x00FE


@dataclass(frozen=True)
class PictureFormat:
    """A picture format.

    Attributes:
        signature: the first bytes of a file.
        animated: whether further pictures are frames, not pages or other views.
    """

    name: str
    signature: re.Pattern[bytes]
    animated: bool = False


_BRAND = rb".{4}ftyp(?:%b)"
_FORMATS = (
    PictureFormat("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), animated=True),
    PictureFormat("JPEG", re.compile(rb"\xff\xd8\xff")),
    PictureFormat("GIF", re.compile(rb"GIF8[79]a"), animated=True),
    PictureFormat("WEBP", re.compile(rb"RIFF.{4}WEBP", re.DOTALL), animated=True),
    PictureFormat("BMP", re.compile(rb"BM.{4}\0{4}", re.DOTALL)),
    PictureFormat("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]")),
    # `mif1` only means that it is a picture; the codec is in the following brands.
    PictureFormat("AVIF", re.compile(_BRAND % rb"avi[fs]|mif1.{4}(?:.{4})*?avif", re.DOTALL), animated=True),
    PictureFormat("HEIF", re.compile(_BRAND % rb"hei[cmxs]|mif1", re.DOTALL)),
)
# Motion JPEG is a sequence of JPEG pictures, as is a phone's photo with its preview; the file name distinguishes them.
_MOTION_JPEG_SUFFIXES = (".mjpeg", ".mjpg")


def picture_format(head: bytes, path: Path) -> PictureFormat | None:
    """Return the picture format for the first `HEAD_BYTES` of a file; None for other files."""
    found = next((kind for kind in _FORMATS if kind.signature.match(head)), None)
    if found is not None and found.name == "JPEG" and path.suffix.lower() in _MOTION_JPEG_SUFFIXES:
        return None
    return found


@contextmanager
def opened_picture(file: BinaryIO, path: Path, kind: PictureFormat) -> Iterator["Picture"]:
    """Open a picture file of this format.

    Raises:
        DataError: it is damaged, too large, or of an unsupported kind.
    """
    if kind.name == "HEIF":
        # Takes a while to import.
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with _told_as_damage(path, kind):
        image = Image.open(file, formats=[kind.name])
    with image:
        check_size(image.width, image.height, path)
        yield Picture(image, path, kind)


class Picture:
    """An open picture or animation.

    Attributes:
        notes: warnings for the user.
    """

    def __init__(self, image: Image.Image, path: Path, kind: PictureFormat) -> None:
        self._image = image
        self._path = path
        self._kind = kind
        with _told_as_damage(path, kind):
            pictures: int = getattr(image, "n_frames", 1)
        # In some animated PNGs, the first picture is a fallback for programs without animation.
        self._first = int(pictures > 1 and getattr(image, "default_image", False))
        self._count = pictures - self._first if kind.animated else 1
        self.notes = self._notes(pictures)

    def info(self) -> VideoInfo:
        """Describe the picture; decodes its first frame."""
        orientation = self._load(0)
        height, width = upright(_rgb(self._image, self._path), orientation).shape[:2]
        shown_ms = self._image.info.get("duration", 0) if self._count > 1 else 0
        fps = 1000 / shown_ms if shown_ms else 0.0
        return VideoInfo(self._count, width, height, fps, None, rotation_degrees(orientation))

    def count(self, limit: int) -> int:
        """Count the frames, up to `limit`."""
        return min(self._count, limit)

    def frames(self, stride: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield every Nth frame as (number, uint8 `(H, W, 3)`), RGB and upright; stop at damage in an animation."""
        for number in range(self._count):
            try:
                orientation = self._load(number)
            except DataError as error:
                if number == 0:
                    raise
                reason = str(error).removeprefix(f"{self._path}: ")
                self.notes.append(f"only {number} of its {self._count} frames can be decoded ({reason})")
                return
            if number % stride == 0:
                yield number, upright(_rgb(self._image, self._path), orientation)

    def losses(self) -> list[str]:
        """Return an empty list: `frames` adds messages about lost frames to `notes`."""
        return []

    def _notes(self, pictures: int) -> list[str]:
        # JPEG files of phones contain a preview after the picture, which is not worth a warning.
        if self._kind.animated or pictures == 1 or self._kind.name == "JPEG":
            return []
        which = "primary" if self._kind.name == "HEIF" else "first"
        return [f"using the {which} one of its {pictures} pictures"]

    def _load(self, number: int) -> Orientation:
        """Decode a frame; return its orientation."""
        with _told_as_damage(self._path, self._kind):
            if self._kind.animated:
                self._image.seek(self._first + number)
            check_size(self._image.width, self._image.height, self._path)
            if self._kind.name == "TIFF" and getattr(self._image, "tag_v2", {}).get(_NEW_SUBFILE_TYPE, 0) & 1:
                raise DataError(f"{self._path}: it only contains a thumbnail, like a camera's raw file")
            self._image.load()
            # After loading: for some formats, Pillow has already rotated the picture.
            return BY_EXIF.get(self._image.getexif().get(_EXIF_ORIENTATION, 1), UPRIGHT)


@contextmanager
def _told_as_damage(path: Path, kind: PictureFormat) -> Iterator[None]:
    """Convert all errors of Pillow within the block to a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path}: not enough memory for the {kind.name} picture") from error
    except Exception as error:  # Pillow's decoders raise many types of exceptions for damaged files
        reason = str(error).partition(" <_io")[0] or type(error).__name__
        raise DataError(f"{path}: cannot be read as a {kind.name} picture: {reason}") from error


def _rgb(image: Image.Image, path: Path) -> np.ndarray:
    """Convert a picture of any mode to uint8 `(H, W, 3)`."""
    if image.mode.startswith("I"):  # one channel of 16 bits, even if stored in 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{path}: its pixels have 32 bits per channel; only 8 and 16 bits are supported")
        grey = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise DataError(f"{path}: its pixels are floating-point numbers; only integers of 8 and 16 bits are supported")
    return np.array(image.convert("RGB"))
