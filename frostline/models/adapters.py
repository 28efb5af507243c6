"""LoRA adapters on disk: read from any of the usual spellings, write in each, merge into base weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frostline.errors import ConfigError, DataError
from frostline.writing import check_writable, written_whole

from .layouts.names import DENOISER, rename
from .layouts.network import parse_json, read_json

if TYPE_CHECKING:
    from peft import LoraConfig

PEFT = "peft"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Spelling:
    """How one library names the tensors of a layer.

    prefix: before the layer's path. down, up: of the matrices A and B, after it.
    stores_alpha: whether a tensor `.alpha` beside them gives the scale; else the scale is multiplied into B.
    diffusers: whether layers go by diffusers' names.
    """

    prefix: str
    down: str
    up: str
    stores_alpha: bool = False
    diffusers: bool = False


# Sources: `PeftModel.save_pretrained`; `GeneralLoRALoader` of diffsynth; `comfy/lora.py` and
# `comfy/weight_adapter/lora.py` of ComfyUI; `WanLoraLoaderMixin` of diffusers.
SPELLINGS: Mapping[str, Spelling] = {
    PEFT: Spelling("base_model.model.", ".lora_A.weight", ".lora_B.weight"),
    "diffsynth": Spelling("", ".lora_A.default.weight", ".lora_B.default.weight"),
    "comfyui": Spelling("diffusion_model.", ".lora_down.weight", ".lora_up.weight", stores_alpha=True),
    "diffusers": Spelling("transformer.", ".lora_A.weight", ".lora_B.weight", diffusers=True),
}
_TENSOR = re.compile(r"(.+)\.(?:(lora_A|lora_down|lora_B|lora_up)(?:\.default)?\.weight|(alpha))")
_DOWN = ("lora_A", "lora_down")
# Where a file's metadata holds PEFT's config, as JSON, if diffusers wrote it (`loaders/lora_base.py`).
METADATA = "lora_adapter_metadata"
# What `init_lora_weights` begins with where PEFT takes a part of the base weights away as training starts
# (`peft/tuners/lora/layer.py`): the matrices then hold that part, too.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class Adapter:
    """A LoRA on the denoiser: layer W computes `W x + alpha / rank * B A x`.

    layers: by module path in diffsynth's `WanModel`, A (rank, in) and B (out, rank). weights: the file that they are
    from.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    rank: int
    alpha: float
    weights: Path

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names by which PEFT finds exactly these layers, however many blocks a model has: their whole paths."""
        return tuple(sorted(self.layers))


@dataclass(frozen=True)
class _Stated:
    """What is said of the matrices beside them. where: for messages."""

    config: LoraConfig
    where: str


def read_adapter(path: Path) -> Adapter:
    """Read the PEFT folder, or the one file in any of `SPELLINGS`, at `path`.

    Raises:
        ConfigError: it is none, is damaged, its layers differ in rank or scale, or its config says otherwise.
    """
    if path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).is_file():
        # The scale is in the file beside it.
        path = path.parent
    if path.suffix == ".safetensors" and path.is_file():
        tensors, metadata = _read_file(path)
        return _parse(tensors, path, _stated_in(metadata, path))
    config_file, weights = path / CONFIG_FILE, path / WEIGHTS_FILE
    if not weights.is_file() or not config_file.is_file():
        raise ConfigError(f"{path} holds no adapter: {CONFIG_FILE} and {WEIGHTS_FILE} are needed")
    tensors, _ = _read_file(weights)
    return _parse(tensors, weights, _state(read_json(config_file), str(config_file)))


def write_adapter(adapter: Adapter, spelling: str, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write `adapter` as one of `SPELLINGS`: a folder for PEFT, else one safetensors file.

    Args:
        dtype: of the matrices; as they are if not given.
    Raises:
        ConfigError: the spelling is unknown, or goes into another kind of file.
        DataError: `out` cannot be written.
    """
    if spelling not in SPELLINGS:
        raise ConfigError(f"unknown spelling {spelling!r}: use one of {', '.join(SPELLINGS)}")
    style = SPELLINGS[spelling]
    names = rename(adapter.layers, DENOISER, to_diffusers=True) if style.diffusers else {n: n for n in adapter.layers}
    if unknown := sorted(adapter.layers.keys() - names.keys()):
        raise ConfigError(f"the adapter has the layer {unknown[0]}, which Wan's denoiser has not")
    # PEFT has the scale in its config.
    keeps_scale = style.stores_alpha or spelling == PEFT
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in adapter.layers.items():
        name = style.prefix + names[layer]
        tensors[name + style.down] = down.to(dtype or down.dtype)
        scaled = up if keeps_scale else up.float() * adapter.scale
        tensors[name + style.up] = scaled.to(dtype or up.dtype)
        if style.stores_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(float(adapter.alpha))
    if spelling != PEFT:
        if out.suffix != ".safetensors":
            raise ConfigError(f"{out}: adapters in the spelling of {spelling} are one .safetensors file")
        _write_tensors(tensors, out)
        return
    from peft import LoraConfig

    alpha: int = adapter.alpha  # type: ignore[assignment]  # peft takes fractions too
    write_peft(tensors, LoraConfig(r=adapter.rank, lora_alpha=alpha, target_modules=list(adapter.target_modules)), out)


def write_peft(tensors: Mapping[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as `PeftModel.save_pretrained` does."""
    _write_tensors(tensors, folder / WEIGHTS_FILE)
    config.save_pretrained(str(folder))


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A denoiser whose weights have these shapes, in Wan's own spelling, has the layers of the adapter.

    Raises:
        ConfigError: a layer is not there, or has another shape.
    """
    for layer, (down, up) in adapter.layers.items():
        name, wanted = f"{layer}.weight", (up.shape[0], down.shape[1])
        if shapes.get(name) != wanted:
            found = f"of shape {shapes[name]}" if name in shapes else "not there"
            raise ConfigError(f"{adapter.weights} does not fit the model: {name} is {found}, not {wanted}")


def merge_adapter(
    tensors: Mapping[str, Tensor], adapter: Adapter, lora_scale: float = 1.0, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The weights of a denoiser with the adapter in them, `W + lora_scale * alpha / rank * B A`.

    Computed in fp32, one weight at a time, and rounded once.

    Args:
        tensors: in Wan's own spelling, of the types in their files, so that nothing is rounded twice.
        dtype: of all weights that are returned; the type that each has if not given.
    Raises:
        ConfigError: the adapter is of another model.
    """
    check_fits(adapter, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    merged: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        wanted, matrices = dtype or weight.dtype, adapter.layers.get(name.removesuffix(".weight"))
        if matrices is not None:
            down, up = matrices
            weight = weight.float() + lora_scale * adapter.scale * (up.float() @ down.float())
        merged[name] = weight.to(wanted)
    return merged


def check_weights_file(out: Path) -> None:
    """Refuse, before weights are merged, a place to which they could not be written.

    Raises:
        ConfigError: it is no .safetensors file.
        DataError: it cannot be written.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: weights are written as .safetensors")
    check_writable(out)


def write_weights(tensors: Mapping[str, Tensor], out: Path) -> None:
    """Write tensors as one safetensors file, which appears only complete.

    Raises:
        ConfigError: it is no .safetensors file.
        DataError: it cannot be written.
    """
    check_weights_file(out)
    _write_tensors(tensors, out)


def _parse(tensors: Mapping[str, Tensor], path: Path, stated: _Stated | None) -> Adapter:
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ConfigError(f"{path} is no LoRA of a denoiser: {name}")
        layer, kind, alpha = match.groups()
        if alpha:
            alphas[layer] = float(tensor)
        else:
            (down if kind in _DOWN else up)[layer] = tensor
    if down.keys() != up.keys() or not down:
        odd = sorted(down.keys() ^ up.keys())
        raise ConfigError(f"{path} is no whole LoRA: {odd[0] if odd else 'it'} lacks one of its two matrices")
    for layer, matrix in down.items():
        if matrix.ndim != 2 or up[layer].ndim != 2 or matrix.shape[0] != up[layer].shape[1]:
            raise ConfigError(f"{path}: the matrices of {layer} do not fit each other")
    ranks = {matrix.shape[0] for matrix in down.values()}
    scales = {alphas.get(layer, float(matrix.shape[0])) / matrix.shape[0] for layer, matrix in down.items()}
    if len(ranks) != 1 or len(scales) != 1:
        raise ConfigError(f"{path}: one rank and one scale for all layers are needed, found {ranks} and {scales}")
    rank = ranks.pop()
    alpha = scales.pop() * rank
    plain = _without_prefix(down)
    if stated is not None:
        if alphas:
            raise ConfigError(
                f"{path} has a scale in its .alpha tensors and one in {stated.where}: take one of them out"
            )
        _check_stated(stated, plain.values(), rank, path)
        alpha = stated.config.lora_alpha
    official = _official_names(plain.values())
    return Adapter({official[plain[layer]]: (down[layer], up[layer]) for layer in down}, rank, alpha, path)


def _check_stated(stated: _Stated, layers: Iterable[str], rank: int, path: Path) -> None:
    """PEFT, which goes by the config, would load all the matrices of `path`."""
    from peft.tuners.tuners_utils import check_target_module_exists

    config = stated.config
    if rank != config.r:
        raise ConfigError(f"{path} has rank {rank}, {stated.where} says {config.r}")
    # A weight may be named itself, too; its matrices are those of the layer.
    weights = tuple(f".{name}" for name in config.target_parameters or ())
    left_out = (n for n in layers if not check_target_module_exists(config, n) and not f".{n}.weight".endswith(weights))
    stray = next(left_out, None)
    if stray is not None:
        raise ConfigError(
            f"{stated.where} does not target {stray}, so PEFT would leave out its matrices in {path}: "
            f"correct the config, or take them out of the file"
        )


def _without_prefix(layers: Iterable[str]) -> dict[str, str]:
    """Layers without what a program puts before all their names."""
    prefixes = sorted((spelling.prefix for spelling in SPELLINGS.values() if spelling.prefix), key=len, reverse=True)
    plain: dict[str, str] = {}
    for layer in layers:
        prefix = next((p for p in prefixes if layer.startswith(p)), "")
        plain[layer] = layer.removeprefix(prefix)
    return plain


def _official_names(layers: Collection[str]) -> dict[str, str]:
    """Module paths in `WanModel` of layers named as there, or as in diffusers."""
    if not any(mark in layer for layer in layers for mark in (".attn1.", ".attn2.", ".net.")):
        return {layer: layer for layer in layers}
    from_diffusers = rename(layers, DENOISER, to_diffusers=False)
    return {layer: from_diffusers.get(layer, layer) for layer in layers}


def _stated_in(metadata: Mapping[str, str], path: Path) -> _Stated | None:
    """What diffusers says in a file: under the name of the denoiser, or, of a model alone, under none."""
    text = metadata.get(METADATA)
    if not text:
        return None
    where = f"{METADATA} of {path}"
    settings, prefix = parse_json(text, where), SPELLINGS["diffusers"].prefix
    own = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
    return _state(own or settings, where)


def _state(settings: Mapping[str, Any], where: str) -> _Stated:
    """What these fields of PEFT's `LoraConfig` say.

    Raises:
        ConfigError: they are none, or of more than two matrices a layer on the base weights as they are.
    """
    from peft import LoraConfig

    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        way = (
            "merge it in PEFT (merge_and_unload) and take the merged model"
            if start == "loftq"  # which rounds besides, so no matrices make good what it does
            else "save it as an ordinary LoRA, by save_pretrained of PEFT with path_initial_model_for_weight_conversion"
        )
        raise ConfigError(f"{where}: init_lora_weights {start!r} is not supported, it changes the base weights: {way}")
    try:
        config = LoraConfig.from_peft_type(**settings)
    except Exception as error:  # peft raises many types of its own
        raise ConfigError(f"{where} cannot be read: {error}") from error
    if not isinstance(config, LoraConfig) or not config.target_modules:
        raise ConfigError(f"{where} is no LoRA with target_modules")
    for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            raise ConfigError(f"{where}: {name} is not supported, one rank and one scale for all layers are")
    return _Stated(config, where)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and what is said about them in the header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with written_whole(path) as part:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, part, metadata={"format": "pt"})
    except SafetensorError as error:
        raise DataError(f"{path}: cannot be written: {error}") from error
