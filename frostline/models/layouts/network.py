"""Files on disk as one network: which it is, in whose spelling, of what shapes, and its tensors."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from frostline.errors import ConfigError

from .names import Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Spelling = Literal["official", "diffusers"]

SUFFIXES = (".safetensors", ".pth")
_SHARD = re.compile(r"(.*-)\d{5}(-of-(\d{5})\.safetensors)")
# Community files wrap a denoiser in the name that it has inside a larger program.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
# A tensor that only this network, so spelled, has.
_TELLTALES: Mapping[str, tuple[Part, Spelling]] = {
    "blocks.0.self_attn.q.weight": ("denoiser", "official"),
    "blocks.0.attn1.to_q.weight": ("denoiser", "diffusers"),
    "encoder.conv1.weight": ("vae", "official"),
    "encoder.conv_in.weight": ("vae", "diffusers"),
    "blocks.0.attn.q.weight": ("text_encoder", "official"),
    "encoder.block.0.layer.0.SelfAttention.q.weight": ("text_encoder", "diffusers"),
    "visual.patch_embedding.weight": ("image_encoder", "official"),
    "vision_model.embeddings.patch_embedding.weight": ("image_encoder", "diffusers"),
    "embeddings.patch_embedding.weight": ("image_encoder", "diffusers"),
}


@dataclass(frozen=True)
class NetworkFiles:
    """The files that together hold one network.

    prefix: what stands before every name. shapes: by name, in Wan's own spelling. config: `config.json` beside them.
    """

    part: Part
    spelling: Spelling
    paths: tuple[Path, ...]
    prefix: str
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """For messages: the file, or the first of several."""
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        first = next(iter(self.paths))
        return f"{first}{more}"

    def read(self, dtype: torch.dtype | None, device: str | torch.device) -> dict[str, Tensor]:
        """All tensors, in Wan's own spelling; `dtype` None keeps the type that each has in its file.

        Raises:
            ConfigError: a file cannot be read; the message names it.
        """
        from diffsynth.core.loader.file import load_state_dict

        with _reading(self.paths):
            tensors = load_state_dict([str(path) for path in self.paths], dtype, str(device))
        return _spelled_officially(self.part, self.spelling, self.prefix, tensors)


def recognise(paths: Sequence[Path]) -> NetworkFiles | None:
    """What the files hold together, told from the names of their tensors alone; None where it is no part of Wan.

    Raises:
        ConfigError: a file cannot be read, or has names that do not belong to what it seems to be.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        shapes.update(read_shapes(path))
    wrapped = (p for p in _PREFIXES if shapes and all(name.startswith(p) for name in shapes))
    prefix = next(wrapped, "")
    for telltale, (part, spelling) in _TELLTALES.items():
        if prefix + telltale in shapes:
            try:
                official_shapes = _official_shapes(part, spelling, prefix, shapes)
            except ConfigError as error:
                raise ConfigError(f"{paths[0]}: {error}") from error
            config = read_json(paths[0].parent / "config.json")
            return NetworkFiles(part, spelling, tuple(paths), prefix, official_shapes, config)
    return None


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a file, without reading their values.

    Raises:
        ConfigError: it cannot be read, or holds no tensors by name.
    """
    with _reading([path]):
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="numpy") as file:  # no value is read, so bf16 is no matter
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        from torch import Tensor

        content = _load_mapped(path)
        # As diffsynth unwraps it.
        if isinstance(content, dict) and len(content) == 1:
            content = next((content[k] for k in ("state_dict", "module", "model_state") if k in content), content)
        if not isinstance(content, dict):
            raise ValueError("it holds no tensors by name")
        return {name: tuple(tensor.shape) for name, tensor in content.items() if isinstance(tensor, Tensor)}


def shard_groups(folder: Path) -> list[tuple[Path, ...]]:
    """The weight files of a folder, those that are shards of one network together.

    Raises:
        ConfigError: a shard is missing; without it a model with fewer blocks would seem whole.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    groups: list[tuple[Path, ...]] = []
    taken: set[Path] = set()
    for index in sorted(folder.glob("*.safetensors.index.json")):
        groups.append(_indexed(index))
        taken.update(groups[-1])
    for path in files:
        if path not in taken:
            groups.append(_numbered(path))
            taken.update(groups[-1])
    return groups


def read_json(path: Path) -> dict[str, Any]:
    """A mapping of settings; empty where there is no such file.

    Raises:
        ConfigError: it is there, but no JSON mapping.
    """
    if not path.is_file():
        return {}
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A mapping of settings, which stands in `where`.

    Raises:
        ConfigError: it is no JSON mapping.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a mapping of settings")
    return content


def _indexed(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"{index} holds no weight_map")
    shards = sorted(set(names.values()))
    for shard in shards:
        # A path from a file stays inside its folder.
        if Path(shard).name != shard:
            raise ConfigError(f"{index} names {shard}, which is not a file beside it")
        if not (index.parent / shard).is_file():
            raise ConfigError(f"incomplete: {index.parent / shard} is missing, {index.name} names it")
    return tuple(index.parent / shard for shard in shards)


def _numbered(path: Path) -> tuple[Path, ...]:
    of_many = _SHARD.fullmatch(path.name)
    if of_many is None:
        return (path,)
    head, tail, count = of_many.groups()
    shards = tuple(path.with_name(f"{head}{number:05d}{tail}") for number in range(1, int(count) + 1))
    for shard in shards:
        if not shard.is_file():
            raise ConfigError(f"incomplete: {shard} is missing")
    return shards


def _spelled_officially(
    part: Part, spelling: Spelling, prefix: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if spelling != "diffusers":
        return plain
    from .convert import to_official

    return to_official(part, plain)


def _official_shapes(
    part: Part, spelling: Spelling, prefix: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    if spelling != "diffusers":
        # Whoever only looks need not wait for torch to be imported.
        return {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    import torch

    # On the meta device a conversion is one of shapes.
    skeleton = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    official = _spelled_officially(part, spelling, prefix, skeleton)
    return {name: tuple(tensor.shape) for name, tensor in official.items()}


def _load_mapped(path: Path) -> Any:
    """A torch file, its values left on disk where its format allows."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _reading(paths: Sequence[Path]) -> Iterator[None]:
    """Within the block whatever the readers raise becomes a `ConfigError` that names the files."""
    names = ", ".join(map(str, paths))
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{names} cannot be read: it is damaged, or holds more than tensors") from error
    except Exception as error:  # safetensors and torch.load raise many types of their own
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{names} cannot be read: {first_line}") from error
