"""Files on disk as one network: its part, format, shapes and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from frostline.errors import ConfigError

from .architecture import Shapes, missing_blocks
from .names import Part
from .quantised import FP8, StoredWeights, as_rows, dequantise, find_weights
from .settings_files import read_json
from .tensor_files import Header, TensorInfo, open_tensors, read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Spelling = Literal["official", "diffusers"]

# Prefixes in community files: the path of the denoiser in a larger module.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
# Not weights: the tokenizer that ComfyUI stores in files of the text encoder.
_NO_WEIGHTS = ("spiece_model",)
# Tensor names that occur in only one network and format.
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
    """The files that together contain one network.

    Attributes:
        prefix: prefix of every tensor name.
        shapes: the shape of each weight, by name in Wan's format.
        stored: the weights by their names in the files.
        config: `config.json` in the same folder.
    """

    part: Part
    spelling: Spelling
    paths: tuple[Path, ...]
    prefix: str
    shapes: Shapes = field(repr=False)
    stored: StoredWeights = field(repr=False)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the file, or the first of several, for messages."""
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        first = next(iter(self.paths))
        return f"{first}{more}"

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Return the compute dtype of a model with 8-bit weights; None for a model without 8-bit weights."""
        import torch

        name = self.stored.compute_type
        return None if name is None else getattr(torch, name)

    def check_blocks(self) -> None:
        """Check that no blocks are missing: a network with fewer blocks would look complete.

        Raises:
            ConfigError: a block is missing, or the number of blocks differs from `config.json`.
        """
        if problem := missing_blocks(self.part, self.shapes, self.config):
            raise ConfigError(f"incomplete: {self}: {problem}")

    def read(
        self, dtype: torch.dtype, device: str | torch.device, wanted: Callable[[str], bool] = lambda name: True
    ) -> dict[str, Tensor]:
        """Return tensors by name in Wan's format and with one dtype; scales of 8-bit weights are applied.

        Args:
            wanted: names in Wan's format; other tensors are not returned, and not read from .safetensors files in
                Wan's format.
        Raises:
            ConfigError: a file cannot be read; the message names it.
        """
        exact = _StoredExactly(self, device)
        # Several tensors of diffusers may form one of Wan's, so all must be converted.
        names = [n for n in exact if self.spelling == "diffusers" or wanted(n.removeprefix(self.prefix))]
        tensors = {name: exact[name].to(dtype) for name in names}
        official = _spelled_officially(self.part, self.spelling, self.prefix, tensors)
        return {name: tensor for name, tensor in official.items() if wanted(name)}

    def read_exact(self, mapped: bool = False) -> ExactWeights:
        """Return the tensors of a denoiser or a text encoder by name in Wan's format, each read on access.

        8-bit weights become fp32, with their scales applied; other tensors are unchanged.

        Args:
            mapped: see `open_tensors`.
        Raises:
            ConfigError: a file cannot be read; the message names it.
        """
        assert self.part in ("denoiser", "text_encoder")  # other parts need more than new names
        stored = _StoredExactly(self, "cpu", mapped)
        names: Any = {name: name for name in stored}
        return ExactWeights(
            stored, cast("dict[str, str]", _spelled_officially(self.part, self.spelling, self.prefix, names))
        )


def recognise(paths: Sequence[Path]) -> NetworkFiles | None:
    """Detect the network in files from its tensor names; return None if it is not part of a Wan model.

    Raises:
        ConfigError: a file cannot be read, contains unexpected names, or is quantised in a format that frostline does
            not support.
    """
    header = _joined_header(paths)
    if not header.tensors:
        return None
    stored = find_weights(header, paths[0])
    names = stored.infos
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in names)), "")
    for telltale, (part, spelling) in _TELLTALES.items():
        if prefix + telltale in names:
            config = read_json(paths[0].parent / "config.json")
            try:
                shapes = _official_shapes(part, spelling, prefix, {name: info.shape for name, info in names.items()})
            except ConfigError as error:
                raise ConfigError(f"{paths[0]}: {error}") from error
            return NetworkFiles(part, spelling, tuple(paths), prefix, shapes, stored, config)
    return None


class _StoredExactly(Mapping[str, "Tensor"]):
    """Weights by their names in their files, read one at a time: 8-bit weights in fp32, others unchanged."""

    def __init__(self, network: NetworkFiles, device: str | torch.device, mapped: bool = False) -> None:
        self._stored = network.stored
        self._tensors = open_tensors(network.paths, device, mapped)

    def __getitem__(self, name: str) -> Tensor:
        tensor, scale = self._tensors[name], self._stored.scales.get(name)
        if self._stored.infos[name].dtype not in FP8:
            return tensor
        return dequantise(tensor, None if scale is None else self._tensors[scale])

    def as_rows(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return an 8-bit weight as stored, with a scale for each row; None if it is not stored in this way."""
        if self._stored.infos[name].dtype not in FP8:
            return None
        scale = self._stored.scales.get(name)
        return as_rows(self._tensors[name], None if scale is None else self._tensors[scale])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.infos)

    def __len__(self) -> int:
        return len(self._stored.infos)


class ExactWeights(Mapping[str, "Tensor"]):
    """Weights by name in Wan's format, read one at a time; see `NetworkFiles.read_exact`.

    Args:
        names: maps names in Wan's format to names in the files.
    """

    def __init__(self, tensors: _StoredExactly, names: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._old = names

    def as_rows(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return an 8-bit weight as stored (see `as_rows`); None if it is not stored in this way."""
        return self._tensors.as_rows(self._old[name])

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._old[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._old)

    def __len__(self) -> int:
        return len(self._old)


def _joined_header(paths: Sequence[Path]) -> Header:
    headers = [read_header(path) for path in paths]
    tensors: dict[str, TensorInfo] = {}
    for path, header in zip(paths, headers, strict=True):
        weights = {name: info for name, info in header.tensors.items() if name not in _NO_WEIGHTS}
        if twice := next((name for name in weights if name in tensors), None):
            raise ConfigError(f"{path}: {twice} is also in another file of the same network: remove one of the files")
        tensors.update(weights)
    metadata = {name: text for header in headers for name, text in header.metadata.items()}
    texts = {name: text for header in headers for name, text in header.texts.items()}
    return Header(tensors, metadata, texts)


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
        # Commands that only read metadata do not import torch.
        return {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    import torch

    # On the meta device, a conversion only computes shapes.
    skeleton = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    official = _spelled_officially(part, spelling, prefix, skeleton)
    return {name: tuple(tensor.shape) for name, tensor in official.items()}
