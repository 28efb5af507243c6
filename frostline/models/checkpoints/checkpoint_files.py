"""Find the files of a Wan model: a built-in model, a folder in Wan's or diffusers' layout, or single files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from frostline.errors import ConfigError
from frostline.models.wan.model_spec import ModelSpec
from frostline.models.wan.networks import NETWORKS
from frostline.models.wan.video_shape import MASK_CHANNELS

from .formats.architecture import network_arguments
from .formats.foreign import GGUF
from .formats.model_card import stated_license
from .formats.names import Part
from .formats.network import NetworkFiles, recognise
from .formats.settings_files import read_json
from .formats.shards import check_all_listed, shard_groups

if TYPE_CHECKING:
    from diffsynth.core.loader.config import ModelConfig

    from frostline.experts import ExpertName

Entry: TypeAlias = "str | Path | ModelConfig | Sequence[str | Path]"

_TINY = Path(__file__).parents[1] / "tiny" / "weights"
EMBEDDED = ("tiny", "tiny-moe", "tiny-ti2v")
# Frames, height and width of the training clips of these models.
EMBEDDED_VIDEO = (9, 96, 96)
_TOKENIZERS = (Path("google") / "umt5-xxl", Path("tokenizer"))
# The official text encoder always pads to this many tokens.
TEXT_LENGTH = 512
# The boundary of the published models with two experts: Wan2.2 I2V A14B and T2V A14B.
_BOUNDARY_IMAGE, _BOUNDARY_TEXT = 0.9, 0.875
# Names of the parts in messages, and their usual locations.
_CALLED: Mapping[str, str] = {
    "denoiser": "the denoiser (diffusion_pytorch_model*.safetensors, or transformer/)",
    "denoiser_high_noise": "the high-noise expert (high_noise_model/, or transformer/ next to transformer_2/)",
    "vae": "the VAE (Wan2.*_VAE.pth, or vae/)",
    "text_encoder": "the text encoder (models_t5*.pth, or text_encoder/)",
    "image_encoder": "the image encoder (models_clip*.pth, or image_encoder/)",
    "tokenizer": "the tokenizer (google/umt5-xxl/, or tokenizer/)",
}
# In diffusers, `transformer` runs first; in a model with two experts, it is the high-noise expert.
_DIFFUSERS_FOLDERS = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")


@dataclass(frozen=True)
class WanFiles:
    """The spec of a Wan model, and the files of each of its networks, with the same keys as in the spec."""

    spec: ModelSpec
    networks: Mapping[str, NetworkFiles]
    tokenizer: Path

    @property
    def denoiser(self) -> NetworkFiles:
        """Return the files of the denoiser; with two experts, those of the low-noise expert."""
        return self.networks["denoiser"]

    def expert(self, expert: ExpertName) -> NetworkFiles:
        """Return the files of an expert; the only denoiser of a model without experts is `low`."""
        return self.networks["denoiser_high_noise" if expert == "high" else "denoiser"]

    @property
    def variant(self) -> str:
        """Return a description of what the model does."""
        experts = ", two experts" if self.spec.two_experts else ""
        return _variant(self.spec.networks["denoiser"]) + experts

    def paths(self) -> Iterator[Path]:
        """Yield the weight files, the config.json next to those of each network, and the files of the tokenizer."""
        for network in self.networks.values():
            yield from network.paths
            config = network.paths[0].parent / "config.json"
            if config.is_file():
                yield config
        yield from sorted(path for path in self.tokenizer.iterdir() if path.is_file())

    def __str__(self) -> str:
        found = ", ".join(f"{_plain(field)} in {network}" for field, network in self.networks.items())
        return f"{self.spec.name}: {self.variant}; {found}, tokenizer in {self.tokenizer}"


def find_files(model: str | Path | Sequence[Entry]) -> WanFiles:
    """Find the files of each part of `model`; see `load_components`.

    Raises:
        ConfigError: a part is missing, ambiguous or not supported; the message lists what was found.
    """
    if not isinstance(model, str | Path):
        return _from_list(model)
    if str(model) in EMBEDDED:
        return _embedded(str(model))
    path = Path(model)
    if path.is_file():
        return _from_list([path])
    if not path.is_dir():
        raise ConfigError(f"{model} is neither a directory nor a built-in model ({', '.join(EMBEDDED)})")
    return _from_diffusers_folder(path) if (path / "model_index.json").is_file() else _from_folder(path)


def released_boundary(denoiser: Mapping[str, Any]) -> float:
    """Return the boundary of the published model with this denoiser; see `ModelSpec`."""
    return _BOUNDARY_IMAGE if denoiser["require_vae_embedding"] else _BOUNDARY_TEXT


def _embedded(name: str) -> WanFiles:
    tiny = _from_folder(_TINY / "tiny")
    if name == "tiny":
        return tiny
    if name == "tiny-moe":
        other = {"denoiser_high_noise": _denoiser_in(_TINY / name / "high_noise_model")}
    else:
        other = {"denoiser": _denoiser_in(_TINY / name)}
    networks = {**tiny.networks, **other}
    spec = _spec(name, networks, tiny.spec.text_length, tiny.spec.boundary)
    return WanFiles(spec, networks, tiny.tokenizer)


def _denoiser_in(folder: Path) -> NetworkFiles:
    found = [network for paths in shard_groups(folder) if (network := recognise(paths))]
    if not found and (quantised := _gguf_in(folder)):
        raise ConfigError(f"{quantised[0]} is {GGUF}")
    if len(found) != 1 or found[0].part != "denoiser":
        raise ConfigError(f"{folder} contains no Wan denoiser, or more than one: it must contain exactly one")
    return found[0]


def _from_folder(folder: Path) -> WanFiles:
    """Find the files in a folder in Wan's layout or with single files; each part is detected from tensor names."""
    config = read_json(folder / "config.json")
    groups = shard_groups(folder)
    parts: dict[str, list[NetworkFiles]] = {}
    if (folder / "low_noise_model").is_dir() or (folder / "high_noise_model").is_dir():
        for field, name in (("denoiser", "low_noise_model"), ("denoiser_high_noise", "high_noise_model")):
            if not (folder / name).is_dir():
                raise ConfigError(f"incomplete: one of the two experts is missing: {folder / name}")
            parts[field] = [_denoiser_in(folder / name)]
    strange = [*_sort_in(groups, parts), *_gguf_in(folder)]
    return _assemble(folder.resolve().name, str(folder), parts, _tokenizer_in(folder), config, strange)


def _gguf_in(folder: Path) -> list[Path]:
    """Return GGUF files, which are not supported, to explain why a part is missing."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")


def _from_diffusers_folder(folder: Path) -> WanFiles:
    index = read_json(folder / "model_index.json")
    parts: dict[str, list[NetworkFiles]] = {}
    strange: list[Path] = []
    for name in _DIFFUSERS_FOLDERS:
        if not (folder / name).is_dir():
            continue
        field = "denoiser" if name.startswith("transformer") else name
        strange += _gguf_in(folder / name)
        for paths in shard_groups(folder / name):
            network = recognise(paths)
            if network is None or network.part != field:
                strange.append(paths[0])
            elif name == "transformer" and (folder / "transformer_2").is_dir():
                parts.setdefault("denoiser_high_noise", []).append(network)
            else:
                parts.setdefault(field, []).append(network)
    config = {"boundary": index["boundary_ratio"]} if index.get("boundary_ratio") is not None else {}
    return _assemble(folder.resolve().name, str(folder), parts, _tokenizer_in(folder), config, strange)


def _from_list(entries: Sequence[Entry]) -> WanFiles:
    """Find the files in a list of files, lists of shards, diffsynth `ModelConfig`s, and the tokenizer's folder."""
    groups: list[tuple[Path, ...]] = []
    tokenizer = None
    for entry in entries:
        paths = tuple(map(Path, _paths_of(entry)))
        for path in paths:
            if not path.exists():
                raise ConfigError(f"{path}: no such file or folder")
        if len(paths) == 1 and paths[0].is_dir():
            tokenizer = paths[0]
        else:
            check_all_listed(paths)
            groups.append(paths)
    parts: dict[str, list[NetworkFiles]] = {}
    strange = _sort_in(groups, parts)
    denoisers = parts.get("denoiser", [])
    if len(denoisers) == 2:
        high, low = _told_apart(*denoisers)
        parts["denoiser_high_noise"], parts["denoiser"] = [high], [low]
    name = re.sub(r"-\d{5}-of-\d{5}$", "", denoisers[0].paths[0].stem) if denoisers else "model"
    where = ", ".join(str(paths[0]) for paths in groups)
    return _assemble(name, where, parts, tokenizer, {}, strange)


def _told_apart(one: NetworkFiles, other: NetworkFiles) -> tuple[NetworkFiles, NetworkFiles]:
    """Return the high-noise expert, then the low-noise expert, identified by words that only one path contains.

    Raises:
        ConfigError: the paths do not show which is which.
    """
    paths = [network.paths[0].absolute() for network in (one, other)]
    # Ignore common parent folders: their names may contain "low" or "high" by chance, as in "workflows".
    shared = os.path.commonpath(paths)
    own_parts = [path.relative_to(shared).parts for path in paths]
    # diffusers' folder names: `transformer` is the high-noise expert, `transformer_2` the low-noise expert.
    folders = [parts[:1] for parts in own_parts]
    if folders == [("transformer",), ("transformer_2",)]:
        return one, other
    if folders == [("transformer_2",), ("transformer",)]:
        return other, one
    words = [set(re.findall("[a-z0-9]+", "/".join(parts).lower())) for parts in own_parts]
    first, second = (
        [level for level in ("high", "low") if any(level in word for word in own)]
        for own in (words[0] - words[1], words[1] - words[0])
    )
    if (first, second) == (["high"], ["low"]):
        return one, other
    if (first, second) == (["low"], ["high"]):
        return other, one
    raise ConfigError(
        f"{one} and {other} are both denoisers, and their names do not show which is the "
        'high-noise expert: put "high" in the name of one and "low" in the name of the other, '
        "or give the folder of the whole model"
    )


def _paths_of(entry: Any) -> Sequence[str | Path]:
    if hasattr(entry, "origin_file_pattern"):  # a `ModelConfig`
        if entry.path is None:
            raise ConfigError(
                f"ModelConfig of {entry.model_id} has no path: frostline does not download models; set the path"
            )
        entry = entry.path
    return [entry] if isinstance(entry, str | Path) else entry


def _sort_in(groups: Sequence[tuple[Path, ...]], parts: dict[str, list[NetworkFiles]]) -> list[Path]:
    """Add each group of files to its part; return the files that are not part of Wan."""
    strange = []
    for paths in groups:
        network = recognise(paths)
        if network is None:
            strange.append(paths[0])
        else:
            parts.setdefault(network.part, []).append(network)
    return strange


def _tokenizer_in(folder: Path) -> Path | None:
    return next((folder / name for name in _TOKENIZERS if (folder / name).is_dir()), None)


def _assemble(
    name: str,
    where: str,
    parts: Mapping[str, list[NetworkFiles]],
    tokenizer: Path | None,
    config: Mapping[str, Any],
    strange: Sequence[Path],
) -> WanFiles:
    for part, found in parts.items():
        if len(found) > 1:
            files = " and ".join(str(network) for network in found)
            raise ConfigError(f"{_called(part)}: one is needed, found {len(found)} in {where}: {files}: keep only one")
    one: dict[str, NetworkFiles] = {part: found[0] for part, found in parts.items()}
    needed = ["denoiser", "vae", "text_encoder"]
    arguments = _arguments(one["denoiser"]) if "denoiser" in one else {}
    for network in one.values():
        network.check_blocks()
    takes_clip = arguments.get("has_image_input", False)
    if takes_clip:
        needed.append("image_encoder")
    missing = [_called(part) for part in needed if part not in one]
    if tokenizer is None:
        missing.append(_called("tokenizer"))
    if missing:
        raise ConfigError(f"{where}: {_found(one, arguments, strange)}; missing: {', '.join(missing)}")
    assert tokenizer is not None
    # Wan2.2 does not use a CLIP feature, even if there is an image encoder.
    wanted = [field for field in NETWORKS if field in one and (field != "image_encoder" or takes_clip)]
    networks = {field: one[field] for field in wanted}
    boundary = config.get("boundary", released_boundary(arguments))
    files = WanFiles(_spec(name, networks, config.get("text_len", TEXT_LENGTH), boundary), networks, tokenizer)
    _ = files.variant  # raises if the denoiser is not supported
    return files


def _spec(name: str, networks: Mapping[str, NetworkFiles], text_length: int, boundary: float) -> ModelSpec:
    arguments = {field: _arguments(network) for field, network in networks.items()}
    return ModelSpec(name, arguments, text_length, boundary, stated_license(networks["denoiser"].paths[0]))


def _arguments(network: NetworkFiles) -> dict[str, Any]:
    try:
        return network_arguments(network.part, network.shapes, network.config)
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        what = "contains no Wan denoiser" if network.part == "denoiser" else "cannot be loaded"
        raise ConfigError(f"{network} {what}: {error}") from error


def _variant(arguments: Mapping[str, Any]) -> str:
    """Return a description of what a denoiser does.

    Raises:
        ConfigError: it needs conditions that frostline does not support.
    """
    extra = arguments["in_dim"] - arguments["out_dim"]
    if arguments["has_image_pos_emb"]:
        raise ConfigError("the model has a first-and-last-frame denoiser, which frostline does not support")
    if extra not in (0, arguments["out_dim"] + MASK_CHANNELS):
        raise ConfigError(f"the model has a denoiser with {extra} control channels, which frostline does not support")
    if arguments["fuse_vae_embedding_in_latents"]:
        return "text-and-image-to-video, fixed first frame"
    if not arguments["require_vae_embedding"]:
        return "text-to-video"
    return "image-to-video with CLIP" if arguments["has_image_input"] else "image-to-video without CLIP"


def _found(one: Mapping[str, NetworkFiles], arguments: Mapping[str, Any], strange: Sequence[Path]) -> str:
    known = [f"{_plain(part)} ({_variant(arguments)})" if part == "denoiser" else _plain(part) for part in one]
    quantised = [path.name for path in strange if path.suffix.lower() == ".gguf"]
    others = [path.name for path in strange if path.name not in quantised]
    unknown = f"; not part of a Wan model: {', '.join(others)}" if others else ""
    unread = f"; {quantised[0]} is {GGUF}" if quantised else ""
    return f"found {', '.join(known) or 'nothing'}{unknown}{unread}"


def _called(part: str | Part) -> str:
    return _CALLED[part]


def _plain(field: str) -> str:
    return {"vae": "VAE", "denoiser_high_noise": "high-noise expert"}.get(field, field.replace("_", " "))
