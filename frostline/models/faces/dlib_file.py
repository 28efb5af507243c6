"""Read the weights in dlib's file `dlib_face_recognition_resnet_model_v1.dat`.

The format is that of dlib's `serialize` functions (`serialize.h`, `dnn/core.h`, `dnn/layers.h`). It has no table of
contents, so the file is read from beginning to end, and any difference from this network is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from frostline.errors import ConfigError


@dataclass(frozen=True)
class Convolution:
    """A convolution from `channels_in` to `channels_out`, and the affine layer after it."""

    channels_in: int
    channels_out: int
    kernel: int
    stride: int

    @property
    def padding(self) -> int:
        """Return the padding of dlib's `con`: 0 if there is a stride."""
        return self.kernel // 2 if self.stride == 1 else 0


STEM = Convolution(3, 32, kernel=7, stride=2)
BLOCKS = tuple(
    (Convolution(channels_in, channels, 3, stride), Convolution(channels, channels, 3, 1))
    for channels_in, channels, stride in (
        *[(32, 32, 1)] * 3,
        *[(32, 64, 2), *[(64, 64, 1)] * 3],
        *[(64, 128, 2), *[(128, 128, 1)] * 2],
        *[(128, 256, 2), *[(256, 256, 1)] * 2],
        *[(256, 256, 2)],
    )
)
"""The two convolutions of each residual block; the stride of the first one is the stride of the block."""

CHANNELS, EMBEDDING_DIM = 256, 128
IMAGE_SIZE = 150
MEAN = (122.782, 117.001, 104.298)
"""RGB mean, subtracted from pixels in 0 to 255."""


@dataclass(frozen=True)
class DlibWeights:
    """The content of the file, as float32.

    Attributes:
        convolutions: weight (O, I, K, K), bias, affine scale and shift (O,) of each of the 29, in the order of
            computation.
        projection: (256, 128), to be multiplied from the right.
    """

    convolutions: tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], ...]
    projection: np.ndarray


def read_dlib_weights(path: Path) -> DlibWeights:
    """Read the file.

    Raises:
        ConfigError: the file is missing or contains something else.
    """
    try:
        reader = _Reader(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read dlib's weights from {path}: {error.strerror or error}") from error
    try:
        return _read_network(reader)
    except _UnexpectedError as error:
        raise ConfigError(
            f"{path} is not dlib's dlib_face_recognition_resnet_model_v1.dat: at byte {reader.offset}, {error}"
        ) from None


class _UnexpectedError(Exception):
    """Describes the unexpected content of a file."""


class _Reader:
    """Reads the values that dlib's `serialize` writes, in order."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.offset:
            raise _UnexpectedError(f"the file ends, but {count} more bytes are expected")
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def integer(self) -> int:
        """Read an integer: a byte with sign and number of bytes, then the bytes, least significant first."""
        control = self.bytes(1)[0]
        if control & 0x70 or not 1 <= control & 0x0F <= 8:
            raise _UnexpectedError("a number is expected")
        value = int.from_bytes(self.bytes(control & 0x0F), "little")
        return -value if control & 0x80 else value

    def real(self) -> float:
        """Read a real number: mantissa and exponent to the base 2."""
        mantissa, exponent = self.integer(), self.integer()
        if abs(exponent) > 1000:
            raise _UnexpectedError("a finite number is expected")
        return mantissa * 2.0**exponent

    def text(self, expected: str) -> None:
        length = self.integer()
        found = self.bytes(length) if 0 <= length <= 64 else b""
        if found != expected.encode():
            raise _UnexpectedError(f"found {found.decode('ascii', 'replace')!r}, expected {expected!r}")

    def integers(self, *expected: int) -> None:
        found = tuple(self.integer() for _ in expected)
        if found != expected:
            raise _UnexpectedError(f"found the numbers {found}, expected {expected}")

    def reals(self, count: int) -> None:
        for _ in range(count):
            self.real()

    def flags(self, count: int) -> None:
        """Read Booleans, stored as digits."""
        found = self.bytes(count)
        if not {*found} <= {*b"01"}:
            raise _UnexpectedError(f"found {found!r}, expected {count} Booleans")

    def tensor(self, *shape: int) -> np.ndarray:
        """Read a (samples, channels, rows, columns) little-endian float32 tensor."""
        self.integers(2, *shape)
        count = int(np.prod(shape))
        return np.frombuffer(self.bytes(4 * count), "<f4").astype(np.float32)

    def alias(self, *shape: int) -> None:
        """Read the shape of a part of a tensor."""
        self.integers(1, *shape)

    def layer_end(self) -> None:
        """Read the state of a layer, which is empty after dlib's `clean()`."""
        self.flags(3)
        for _ in range(3):
            self.tensor(0, 0, 0, 0)


def _read_network(reader: _Reader) -> DlibWeights:
    reader.integers(1)
    reader.text("loss_metric_2")
    reader.reals(2)
    # Layers are nested: their versions are stored from the last to the first, their contents from the first to the
    # last.
    reader.integers(*_versions())
    reader.text("input_rgb_image_sized")
    for expected in MEAN:
        if abs(reader.real() - expected) > 1e-4:
            raise _UnexpectedError(f"the mean colour is not {MEAN}")
    reader.integers(IMAGE_SIZE, IMAGE_SIZE)
    convolutions = [_read_convolution(reader, STEM, first=True)]
    _read_relu(reader)
    _read_pool(reader, "max_pool_2", 3, 2)
    for first, second in BLOCKS:
        convolutions.append(_read_convolution(reader, first))
        _read_relu(reader)
        convolutions.append(_read_convolution(reader, second))
        if first.stride > 1:
            _read_pool(reader, "avg_pool_2", 2, 2)
        reader.text("add_prev_")
        reader.layer_end()
        _read_relu(reader)
    _read_pool(reader, "avg_pool_2", 0, 1)
    projection = _read_projection(reader)
    if reader.offset != len(reader.data):
        raise _UnexpectedError("the file contains more bytes than the network needs")
    return DlibWeights(tuple(convolutions), projection)


def _versions() -> Iterator[int]:
    layer, input_layer, tag = 2, 3, 1
    yield from (layer, layer)  # projection, pool
    for first, _ in reversed(BLOCKS):
        yield from (layer, layer)  # ReLU, addition
        if first.stride > 1:
            yield from (layer, tag, tag)  # pool, and a tag that it is applied to the block's input
        yield from (layer, layer, layer, layer, layer, tag)
    yield from (layer, layer, layer, input_layer)


def _read_convolution(
    reader: _Reader, shape: Convolution, first: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    inputs, outputs, kernel, stride, padding = (
        *(shape.channels_in, shape.channels_out, shape.kernel),
        *(shape.stride, shape.padding),
    )
    weights = outputs * inputs * kernel**2
    reader.text("con_4")
    parameters = reader.tensor(weights + outputs, 1, 1, 1)
    reader.integers(outputs, kernel, kernel, stride, stride, padding, padding)
    reader.alias(outputs, inputs, kernel, kernel)
    reader.alias(1, outputs, 1, 1)
    reader.reals(4)
    reader.layer_end()
    if first:
        reader.integers(1)
    reader.text("affine_")
    affine = reader.tensor(2 * outputs, 1, 1, 1)
    reader.alias(1, outputs, 1, 1)
    reader.alias(1, outputs, 1, 1)
    reader.integers(0)
    reader.layer_end()
    weight = parameters[:weights].reshape(outputs, inputs, kernel, kernel)
    return weight, parameters[weights:], affine[:outputs], affine[outputs:]


def _read_relu(reader: _Reader) -> None:
    reader.text("relu_")
    reader.layer_end()


def _read_pool(reader: _Reader, name: str, kernel: int, stride: int) -> None:
    reader.text(name)
    reader.integers(kernel, kernel, stride, stride, 0, 0)
    reader.layer_end()


def _read_projection(reader: _Reader) -> np.ndarray:
    reader.text("fc_2")
    reader.integers(EMBEDDING_DIM, CHANNELS)
    weights = reader.tensor(CHANNELS, EMBEDDING_DIM, 1, 1)
    reader.alias(CHANNELS, EMBEDDING_DIM, 1, 1)
    reader.alias(0, 0, 0, 0)
    reader.integers(1)
    reader.reals(4)
    reader.layer_end()
    return weights.reshape(CHANNELS, EMBEDDING_DIM)
