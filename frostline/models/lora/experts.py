"""Adapters of two experts: two PEFT folders or two files in one folder, `high_noise` and `low_noise`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from frostline.errors import ConfigError
from frostline.experts import ExpertName, Experts

from .adapter import Adapter, UniformLora
from .names import LayerPath, denoiser_path
from .reading import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from .writing import PEFT

# Name of each expert's adapter; the high noise levels come first.
EXPERT_PARTS: Mapping[ExpertName, str] = {"high": "high_noise", "low": "low_noise"}
_SUFFIX = ".safetensors"


def read_adapters(
    path: Path, layer_path: LayerPath = denoiser_path, experts: Experts | None = None
) -> dict[ExpertName, Adapter]:
    """Read one adapter, or those of two experts in one folder.

    Args:
        path: see `read_adapter`; or a folder with `high_noise` and `low_noise`, each a PEFT folder or a .safetensors
            file.
        layer_path: returns the path of a layer in the denoiser.
        experts: experts whose adapters to read; None reads all in such a folder, and treats a single adapter as the
            low-noise expert's.
    Returns:
        The adapters by expert; the expert for high noise levels comes first.
    Raises:
        ConfigError: see `read_adapter`; or an adapter is missing or ambiguous.
    """
    parts = _parts(path)
    if not parts:
        if experts == "both":
            raise ConfigError(
                f"{path} does not contain adapters of two experts: it must be a folder with "
                f"{' and '.join(EXPERT_PARTS.values())}, each a PEFT folder or a {_SUFFIX} file"
            )
        return {experts or "low": read_adapter(path, layer_path)}
    wanted: list[ExpertName] = [expert for expert in EXPERT_PARTS if experts in (None, "both", expert)]
    for expert in wanted:
        if expert not in parts:
            raise ConfigError(
                f"{path} contains no adapter of the {expert}-noise expert, {EXPERT_PARTS[expert]}/ or "
                f"{EXPERT_PARTS[expert]}{_SUFFIX}"
            )
    return {expert: read_adapter(parts[expert], layer_path) for expert in wanted}


def read_one_adapter(path: Path, layer_path: LayerPath = denoiser_path) -> Adapter:
    """Read one adapter; see `read_adapter`.

    Raises:
        ConfigError: see there; or the folder contains the adapters of two experts.
    """
    if parts := _parts(path):
        raise ConfigError(
            f"{path} contains adapters of two experts "
            f"({', '.join(EXPERT_PARTS[expert] for expert in parts)}): give the path of one of "
            "them, or set lora.experts to both"
        )
    return read_adapter(path, layer_path)


def read_trained_adapters(path: Path, layer_path: LayerPath, experts: Experts) -> dict[ExpertName, Adapter]:
    """Read the adapters of the trained experts; the expert for high noise levels comes first.

    Raises:
        ConfigError: see `read_adapters` for both experts, and `read_one_adapter` for one.
    """
    return (
        read_adapters(path, layer_path, experts) if experts == "both" else {experts: read_one_adapter(path, layer_path)}
    )


def part_path(out: Path, expert: ExpertName, name: str) -> Path:
    """Return the output path for an expert's adapter in a format: a folder in `out` for PEFT, otherwise a file.

    Raises:
        ConfigError: `out` is not a folder name.
    """
    _check_folder(out)
    return out / (EXPERT_PARTS[expert] if name == PEFT else EXPERT_PARTS[expert] + _SUFFIX)


def merged_path(out: Path, expert: ExpertName) -> Path:
    """Return the output path for an expert's merged weights, as in a release.

    Raises:
        ConfigError: `out` is not a folder name.
    """
    _check_folder(out)
    return out / f"{EXPERT_PARTS[expert]}_model" / "diffusion_pytorch_model.safetensors"


def _check_folder(out: Path) -> None:
    if out.suffix == _SUFFIX:
        raise ConfigError(f"{out}: two experts need two files: give a folder")


def uniform_loras(adapters: Mapping[ExpertName, Adapter]) -> dict[ExpertName, UniformLora]:
    """Return the same updates with one rank and one alpha for all layers of all experts; see `Adapter.uniform`.

    Raises:
        ConfigError: see there.
    """
    loras: dict[ExpertName, UniformLora] = {expert: adapter.uniform() for expert, adapter in adapters.items()}
    if len({(lora.rank, lora.alpha) for lora in loras.values()}) == 1:
        return loras
    # Combine the layers of both into one adapter, so that `uniform` gives them the same rank and scale.
    pairs = {(expert, layer): pair for expert, each in adapters.items() for layer, pair in each.layers.items()}
    first = next(iter(adapters.values()))
    joined = Adapter({f"{expert}.{layer}": pair for (expert, layer), pair in pairs.items()}, first.path).uniform()
    for expert, each in adapters.items():
        layers = {layer: joined.layers[f"{expert}.{layer}"] for layer in each.layers}
        loras[expert] = replace(joined, layers=layers, path=each.path)
    return loras


def _parts(path: Path) -> dict[ExpertName, Path]:
    """Return the adapters in a folder of two experts by expert; empty for other folders.

    Raises:
        ConfigError: an expert has two adapters, or there is another adapter in the folder.
    """
    parts: dict[ExpertName, Path] = {}
    for expert, name in EXPERT_PARTS.items():
        there = [place for place in (path / name, path / f"{name}{_SUFFIX}") if place.exists()]
        if len(there) > 1:
            raise ConfigError(f"{path} contains both {there[0].name} and {there[1].name}: remove one of them")
        if there:
            parts[expert] = there[0]
    if parts and ((path / CONFIG_FILE).is_file() or (path / WEIGHTS_FILE).is_file()):
        raise ConfigError(
            f"{path} contains an adapter next to {next(iter(parts.values())).name}: remove one, "
            "because it is not clear which one to use"
        )
    return parts
