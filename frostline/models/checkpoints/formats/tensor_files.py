"""Files of tensors: read names, shapes and dtypes without the values, and values one at a time."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.errors import ConfigError

from .foreign import foreign_kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Names of dtypes in safetensors, and the torch dtypes.
_TYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
}
# These tensors contain text about how ComfyUI quantised a layer.
LAYER_FORMAT = ".comfy_quant"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor without its values.

    Attributes:
        dtype: name of the torch dtype; name in safetensors if torch does not have the dtype.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Header:
    """The content of one or more files, without the values of tensors.

    Attributes:
        tensors: all tensors, by name.
        metadata: text in the header of safetensors.
        texts: tensors that contain text.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read names, dtypes and shapes of the tensors in `path`, without the values.

    Raises:
        ConfigError: the file cannot be read, or does not contain named tensors; the message states what it is.
    """
    with reading([path]):
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="numpy") as file:  # only values of text are read, so bf16 is supported
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                infos = {
                    name: TensorInfo(tuple(part.get_shape()), _TYPES.get(str(part.get_dtype()), str(part.get_dtype())))
                    for name, part in slices.items()
                }
                texts = {name: _text(file.get_tensor(name)) for name in infos if name.endswith(LAYER_FORMAT)}
                return Header(infos, file.metadata() or {}, texts)
        tensors = _load_torch(path, "cpu", mapped=True)
        texts = {name: _text(tensor) for name, tensor in tensors.items() if name.endswith(LAYER_FORMAT)}
        infos = {name: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
        return Header(infos, texts=texts)


def open_tensors(paths: Sequence[Path], device: str | torch.device, mapped: bool = False) -> Mapping[str, Tensor]:
    """Return the tensors of files by name, in their stored dtypes; safetensors are read on access.

    Args:
        mapped: on the CPU, memory-map files of torch.save if possible, so that they are also read on access. The
            tensors then share the memory of the file.
    Raises:
        ConfigError: a file cannot be read.
    """
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for path in paths:
        with reading([path]):
            if path.suffix == ".safetensors":
                found: Mapping[str, Tensor] = _Safetensors(path, device)
            else:
                found = _load_torch(path, device, mapped=mapped)
        tensors.update(dict.fromkeys(found, found))
    return _Joined(tensors)


@contextmanager
def reading(paths: Sequence[Path]) -> Iterator[None]:
    """Convert all exceptions of the readers within the block to a `ConfigError` that names the files.

    Raises:
        ConfigError: reading failed; the message gives the kind of a file that is not a checkpoint.
    """
    names = ", ".join(map(str, paths))
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # safetensors and torch.load raise many types of exceptions
        for path in paths:
            if kind := foreign_kind(path):
                raise ConfigError(f"{path} cannot be read: it is {kind}") from error
        if isinstance(error, pickle.UnpicklingError):
            raise ConfigError(
                f"{names} cannot be read: the file is damaged, or contains objects other than tensors"
            ) from error
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{names} cannot be read: {first_line}") from error


class _Safetensors(Mapping[str, "Tensor"]):
    """The tensors of one memory-mapped file."""

    def __init__(self, path: Path, device: str | torch.device) -> None:
        from safetensors import safe_open

        self._path = path
        self._file = safe_open(path, framework="pt", device=str(device))
        self._names = tuple(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        with reading([self._path]):
            return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Joined(Mapping[str, "Tensor"]):
    """The tensors of several files; if two have the same name, the later one is used."""

    def __init__(self, holders: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._holders = holders

    def __getitem__(self, name: str) -> Tensor:
        return self._holders[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)


def _load_torch(path: Path, device: str | torch.device, *, mapped: bool) -> dict[str, Tensor]:
    """Load a file of torch.save, unwrapped as in diffsynth.

    Args:
        mapped: memory-map the values if the format supports it.
    """
    import torch

    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        content = torch.load(path, map_location=device, weights_only=True)
    if isinstance(content, dict) and len(content) == 1:
        content = next((content[k] for k in ("state_dict", "module", "model_state") if k in content), content)
    if not isinstance(content, dict):
        raise ValueError("it contains no named tensors")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


def _text(values: Any) -> str:
    """Return the text in an array or tensor of bytes."""
    return bytes(values.reshape(-1).tolist()).decode(errors="replace")
