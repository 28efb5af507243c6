"""Read adapters from disk: a PEFT folder, or a file in the format of any supported program."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.checkpoints.formats.settings_files import read_json
from frostline.models.checkpoints.formats.tensor_files import open_tensors, read_header

from .adapter import Adapter, LoraPair, is_finite
from .names import LayerPath, TensorName, denoiser_path, is_of_text_encoder, other_way, parse_name
from .stated import Stated, read_alpha, state, stated_in_header

log = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def read_adapter(path: Path, layer_path: LayerPath = denoiser_path) -> Adapter:
    """Read the adapter at `path`, a PEFT folder or a file in any supported format, and check that its values are
    finite.

    Tensors of a text encoder are skipped with a warning.

    Args:
        layer_path: returns the path of a layer in the denoiser.
    Raises:
        ConfigError: the file is not an adapter, is damaged, has layers that the denoiser does not have, or contradicts
            its config.
    """
    if path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).is_file():
        # The scale is in the config file of the folder.
        path = path.parent
    if path.suffix == ".safetensors" and path.is_file():
        metadata = read_header(path).metadata
        return _assemble(open_tensors([path], "cpu"), path, stated_in_header(metadata, path), layer_path)
    config_file, weights = path / CONFIG_FILE, path / WEIGHTS_FILE
    if not weights.is_file() or not config_file.is_file():
        raise ConfigError(
            f"{path} contains no adapter: it must be a .safetensors file, or a folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    return _assemble(
        open_tensors([weights], "cpu"), weights, state(read_json(config_file), str(config_file)), layer_path
    )


def adapter_files(path: Path) -> tuple[Path, ...]:
    """Return the files that `read_adapter` reads for `path`, whether or not they exist."""
    folder = path.parent if path.name == WEIGHTS_FILE else path
    if path.suffix == ".safetensors" and not (path.name == WEIGHTS_FILE and (folder / CONFIG_FILE).is_file()):
        return (path,)
    return (folder / CONFIG_FILE, folder / WEIGHTS_FILE)


@dataclass
class _Parts:
    """The tensors of an adapter by kind.

    Attributes:
        plain: the name of each layer in the file.
    """

    down: dict[str, Tensor] = field(default_factory=dict)
    up: dict[str, Tensor] = field(default_factory=dict)
    up_bias: dict[str, Tensor] = field(default_factory=dict)
    alpha: dict[str, Tensor] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)

    def of(self, name: TensorName) -> dict[str, Tensor]:
        """Return the dict for the tensor of this name."""
        if name.kind in ("down", "up", "up_bias", "alpha"):
            return getattr(self, name.kind)
        return self.differences


def _assemble(tensors: Mapping[str, Tensor], path: Path, stated: Stated | None, layer_path: LayerPath) -> Adapter:
    parts = _sort(tensors, path, layer_path)
    if not parts.down and not parts.up and not parts.differences:
        raise ConfigError(f"incomplete LoRA: {path} has no matrices of a denoiser")
    for layer in sorted(parts.down.keys() ^ parts.up.keys()):
        raise ConfigError(f"incomplete LoRA: in {path}, A or B of {layer} is missing")
    for layer in sorted({*parts.alpha, *parts.up_bias} - parts.down.keys()):
        raise ConfigError(f"incomplete LoRA: in {path}, {layer} has an alpha or a bias, but no matrices")
    for layer, down in parts.down.items():
        _check_pair(layer, down, parts.up[layer], path)
        if f"{layer}.weight" in parts.differences:
            raise ConfigError(
                f"{path} has both matrices and a difference of {layer}: programs interpret this differently: remove one"
            )
    if stated is not None:
        if parts.alpha:
            raise ConfigError(
                f"{path} has a scale in its .alpha tensors and another in {stated.where}: remove one of them"
            )
        stated.check({parts.plain[layer]: down.shape[0] for layer, down in parts.down.items()}, path)
    pairs = {
        layer: LoraPair(down, parts.up[layer], _alpha(layer, parts, path, stated)) for layer, down in parts.down.items()
    }
    # The bias of B is scaled like B.
    differences = {f"{layer}.bias": pairs[layer].scale * bias.float() for layer, bias in parts.up_bias.items()}
    # Differences that are zero have no effect.
    differences |= {name: tensor for name, tensor in parts.differences.items() if tensor.float().any()}
    if not pairs and not differences:
        raise ConfigError(f"{path} has no effect: it contains only differences, and all of them are zero")
    return Adapter(pairs, path, differences)


def _sort(tensors: Mapping[str, Tensor], path: Path, layer_path: LayerPath) -> _Parts:
    parts, text, strange = _Parts(), [], []
    prefixes: dict[str, str] = {}
    for full_name, tensor in tensors.items():
        if is_of_text_encoder(full_name):
            text.append(full_name)
            continue
        name = parse_name(full_name, layer_path)
        if name is None:
            kind = other_way(full_name) or "tensors other than those of a LoRA"
            raise ConfigError(f"{path} contains {kind}, which frostline does not support: {full_name}")
        prefixes.setdefault(name.prefix, full_name)
        if name.layer is None:
            strange.append(full_name)
            continue
        holder = parts.of(name)
        if name.layer in holder:
            raise ConfigError(f"{path} contains {name.layer} twice, once as {full_name}")
        if not tensor.is_floating_point() and name.kind != "alpha":
            raise ConfigError(f"{path}: {full_name} is {tensor.dtype}, which is not a valid type for a LoRA")
        if not is_finite(tensor) and name.kind != "alpha":
            raise ConfigError(
                f"{path}: {full_name} has NaN or infinite values: the adapter is damaged, or its training diverged"
            )
        holder[name.layer] = tensor
        parts.plain[name.layer] = name.plain
    if strange:
        raise ConfigError(
            f"{path} has {len(strange)} tensors of layers that the denoiser does not have, the first is {strange[0]}"
        )
    if len(prefixes) > 1:
        raise ConfigError(
            f"{path} has names with {len(prefixes)} prefixes "
            f"({', '.join(map(repr, sorted(prefixes)))}), possibly of several models: split the file"
        )
    if text:
        log.warning(
            "%s: skipped %d tensors of a text encoder, the first is %s: only the denoiser is adapted",
            path,
            len(text),
            text[0],
        )
    return parts


def _check_pair(layer: str, down: Tensor, up: Tensor, path: Path) -> None:
    if down.ndim < 2 or up.ndim != down.ndim or down.shape[0] != up.shape[1] or math.prod(up.shape[2:]) != 1:
        raise ConfigError(f"{path}: the matrices of {layer} have incompatible shapes")
    if not down.shape[0]:
        raise ConfigError(f"{path}: the matrices of {layer} have rank 0")


def _alpha(layer: str, parts: _Parts, path: Path, stated: Stated | None) -> float:
    if stated is not None:
        return stated.alpha(parts.plain[layer])
    tensor = parts.alpha.get(layer)
    if tensor is None:
        return float(parts.down[layer].shape[0])
    if tensor.numel() != 1:
        raise ConfigError(f"{path}: the alpha of {layer} must be one number, but has shape {tuple(tensor.shape)}")
    return read_alpha(tensor.item(), f"{path}: the alpha of {layer}")
