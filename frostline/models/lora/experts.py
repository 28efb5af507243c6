"""The adapters of two experts: two PEFT folders or two files in one folder, `high_noise` and `low_noise`."""

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

# What the adapter of each expert is called; the high noise levels come first.
EXPERT_PARTS: Mapping[ExpertName, str] = {"high": "high_noise", "low": "low_noise"}
_SUFFIX = ".safetensors"


def read_adapters(
    path: Path, layer_path: LayerPath = denoiser_path, experts: Experts | None = None
) -> dict[ExpertName, Adapter]:
    """Read one adapter, or those of two experts in one folder.

    Args:
        path: what `read_adapter` takes, or a folder with `high_noise` and `low_noise`, each a PEFT folder or a
            .safetensors file.
        layer_path: the names of the layers that the denoiser has.
        experts: whose adapters are wanted; None takes all of such a folder, and one adapter as the low-noise expert's.
    Returns:
        the adapters by expert, that of the high noise levels first.
    Raises:
        ConfigError: as `read_adapter` does; or one of the adapters is missing, or is there twice.
    """
    parts = _parts(path)
    if not parts:
        if experts == "both":
            raise ConfigError(
                f"{path} is not of two experts: a folder with {' and '.join(EXPERT_PARTS.values())} is needed, each a "
                f"PEFT folder or a {_SUFFIX} file"
            )
        return {experts or "low": read_adapter(path, layer_path)}
    wanted: list[ExpertName] = [expert for expert in EXPERT_PARTS if experts in (None, "both", expert)]
    for expert in wanted:
        if expert not in parts:
            raise ConfigError(
                f"{path} lacks the adapter of the {expert}-noise expert, {EXPERT_PARTS[expert]}/ or "
                f"{EXPERT_PARTS[expert]}{_SUFFIX}"
            )
    return {expert: read_adapter(parts[expert], layer_path) for expert in wanted}


def read_one_adapter(path: Path, layer_path: LayerPath = denoiser_path) -> Adapter:
    """Read one adapter, as `read_adapter` does.

    Raises:
        ConfigError: also where the folder has those of two experts.
    """
    if parts := _parts(path):
        raise ConfigError(
            f"{path} has adapters of two experts ({', '.join(EXPERT_PARTS[expert] for expert in parts)}), and one is "
            "wanted: name one of them, or set lora.experts to both"
        )
    return read_adapter(path, layer_path)


def part_path(out: Path, expert: ExpertName, name: str) -> Path:
    """Return where the adapter of an expert is written in a format: a folder in `out` for PEFT, else a file in it.

    Raises:
        ConfigError: `out` is no name of a folder.
    """
    _check_folder(out)
    return out / (EXPERT_PARTS[expert] if name == PEFT else EXPERT_PARTS[expert] + _SUFFIX)


def merged_path(out: Path, expert: ExpertName) -> Path:
    """Return where the merged weights of an expert are written, as a release has them.

    Raises:
        ConfigError: `out` is no name of a folder.
    """
    _check_folder(out)
    return out / f"{EXPERT_PARTS[expert]}_model" / "diffusion_pytorch_model.safetensors"


def _check_folder(out: Path) -> None:
    if out.suffix == _SUFFIX:
        raise ConfigError(f"{out}: what is of two experts is two files: name a folder for them")


def uniform_loras(adapters: Mapping[ExpertName, Adapter]) -> dict[ExpertName, UniformLora]:
    """Return the same updates with one rank and one alpha for all layers of all experts; see `Adapter.uniform`.

    Raises:
        ConfigError: as there.
    """
    loras: dict[ExpertName, UniformLora] = {expert: adapter.uniform() for expert, adapter in adapters.items()}
    if len({(lora.rank, lora.alpha) for lora in loras.values()}) == 1:
        return loras
    # The layers of both as those of one adapter, whose ranks and scales `uniform` makes the same.
    pairs = {(expert, layer): pair for expert, each in adapters.items() for layer, pair in each.layers.items()}
    first = next(iter(adapters.values()))
    joined = Adapter({f"{expert}.{layer}": pair for (expert, layer), pair in pairs.items()}, first.path).uniform()
    for expert, each in adapters.items():
        layers = {layer: joined.layers[f"{expert}.{layer}"] for layer in each.layers}
        loras[expert] = replace(joined, layers=layers, path=each.path)
    return loras


def _parts(path: Path) -> dict[ExpertName, Path]:
    """The parts of a folder of two experts, by expert; none where it is no such folder.

    Raises:
        ConfigError: one is there twice, or there is an adapter beside them.
    """
    parts: dict[ExpertName, Path] = {}
    for expert, name in EXPERT_PARTS.items():
        there = [place for place in (path / name, path / f"{name}{_SUFFIX}") if place.exists()]
        if len(there) > 1:
            raise ConfigError(f"{path} has {there[0].name} and {there[1].name}: keep one of them")
        if there:
            parts[expert] = there[0]
    if parts and ((path / CONFIG_FILE).is_file() or (path / WEIGHTS_FILE).is_file()):
        raise ConfigError(
            f"{path} has an adapter beside {next(iter(parts.values())).name}, so it is not clear which one is meant"
        )
    return parts
