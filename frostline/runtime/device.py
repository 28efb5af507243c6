"""Devices of engines (`cpu`, or GPUs by compute capability such as `sm_89`), and full fp32 precision."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from frostline.errors import ConfigError


@contextmanager
def full_fp32() -> Iterator[None]:
    """Use full fp32 precision on GPUs within the block: by default, torch's convolutions use TF32 with a 10-bit
    mantissa.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto` (a GPU if available), `cpu`, `cuda` or `cuda:1`.

    Raises:
        ConfigError: the name is invalid, or this machine does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not supported: use auto, cpu, cuda or an indexed GPU such as cuda:1")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device: {name} is requested, but torch finds no GPU: use cpu or auto")
        if (device.index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ConfigError(
                f"device: {name} is requested, but torch finds {count} GPU(s): use an index below {count}"
            )
    return device


def device_name(device: torch.device) -> str:
    """Return `cpu`, or the compute capability, such as `sm_90`."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def free_bytes(device: torch.device) -> int:
    """Return the memory of the device, in bytes, that is available to tensors of this process."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_memory() -> None:
    """Free the memory of tensors that no longer exist, so that the next stage can use it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def total_bytes(device: torch.device) -> int:
    """Return the total memory of the device in bytes."""
    if device.type != "cuda":
        return psutil.virtual_memory().total
    return torch.cuda.get_device_properties(device).total_memory


def sm_name(compute_capability: str) -> str:
    """Return `sm_89` for `8.9`."""
    return "sm_" + compute_capability.replace(".", "")


def compute_capabilities(target: str) -> tuple[str, ...]:
    """Return `8.9` and `12.0` for `sm_89+sm_120`; empty for `cpu`."""
    names = (name.removeprefix("sm_") for name in target.split("+") if name.startswith("sm_"))
    return tuple(f"{name[:-1]}.{name[-1]}" for name in names)
