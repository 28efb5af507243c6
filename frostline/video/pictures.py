"""Pictures and animations, through Pillow: PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, HEIC."""

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
"""So much of a file's start tells what it is."""

_EXIF_ORIENTATION = 0x0112
_NEW_SUBFILE_TYPE = 0x00FE


@dataclass(frozen=True)
class PictureFormat:
    """A format of pictures.

    signature: what a file of it begins with. animated: its further pictures are frames, not pages or other views.
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
    # `mif1` says only that it is a picture; what it is coded in stands behind it.
    PictureFormat("AVIF", re.compile(_BRAND % rb"avi[fs]|mif1.{4}(?:.{4})*?avif", re.DOTALL), animated=True),
    PictureFormat("HEIF", re.compile(_BRAND % rb"hei[cmxs]|mif1", re.DOTALL)),
)
# Motion JPEG is JPEG pictures one behind the other, as is a phone's photo with its preview: the name tells them apart.
_MOTION_JPEG_SUFFIXES = (".mjpeg", ".mjpg")


def picture_format(head: bytes, path: Path) -> PictureFormat | None:
    """Tell by the first `HEAD_BYTES` of a file which kind of picture it is; None for any other file."""
    found = next((kind for kind in _FORMATS if kind.signature.match(head)), None)
    if found is not None and found.name == "JPEG" and path.suffix.lower() in _MOTION_JPEG_SUFFIXES:
        return None
    return found


@contextmanager
def opened_picture(file: BinaryIO, path: Path, kind: PictureFormat) -> Iterator["Picture"]:
    """Open a file whose content is a picture of this kind.

    Raises:
        DataError: it is damaged, too large, or of a sort that cannot be read.
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
    """An open picture or animation. notes: what its reader is to be told."""

    def __init__(self, image: Image.Image, path: Path, kind: PictureFormat) -> None:
        self._image = image
        self._path = path
        self._kind = kind
        with _told_as_damage(path, kind):
            pictures: int = getattr(image, "n_frames", 1)
        # Of some animated PNGs the first picture is a stand-in for programs that show no animation.
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
        """Every so many frames, as (number, uint8 `(H, W, 3)`), RGB and upright. An animation may break off."""
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
        """What was lost on the way; `frames` has noted it."""
        return []

    def _notes(self, pictures: int) -> list[str]:
        # Behind a JPEG phones put its preview and the like, which nobody would look for.
        if self._kind.animated or pictures == 1 or self._kind.name == "JPEG":
            return []
        which = "primary" if self._kind.name == "HEIF" else "first"
        return [f"the {which} one of its {pictures} pictures is used"]

    def _load(self, number: int) -> Orientation:
        """Decode a frame; returns how it is to be turned."""
        with _told_as_damage(self._path, self._kind):
            if self._kind.animated:
                self._image.seek(self._first + number)
            check_size(self._image.width, self._image.height, self._path)
            if self._kind.name == "TIFF" and getattr(self._image, "tag_v2", {}).get(_NEW_SUBFILE_TYPE, 0) & 1:
                raise DataError(f"{self._path}: its picture is a thumbnail, as in a camera's raw file")
            self._image.load()
            # After loading: of some formats, Pillow has turned the picture then.
            return BY_EXIF.get(self._image.getexif().get(_EXIF_ORIENTATION, 1), UPRIGHT)


@contextmanager
def _told_as_damage(path: Path, kind: PictureFormat) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path}: the {kind.name} picture does not fit into memory") from error
    except Exception as error:  # Pillow's decoders let through whatever a damaged file provokes
        reason = str(error).partition(" <_io")[0] or type(error).__name__
        raise DataError(f"{path}: cannot be read as a {kind.name} picture: {reason}") from error


def _rgb(image: Image.Image, path: Path) -> np.ndarray:
    """A picture of any mode as uint8 `(H, W, 3)`."""
    if image.mode.startswith("I"):  # one channel of 16 bits, also where it is kept in 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{path}: its pixels have 32 bits a channel; 8 and 16 can be read")
        grey = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise DataError(f"{path}: its pixels are floating-point numbers; integers of 8 and 16 bits can be read")
    return np.array(image.convert("RGB"))
