"""Load a Wan model from local files, with diffsynth's classes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from frostline.deferred_init import deferred_init
from frostline.errors import ConfigError
from frostline.models.block_offload import placed, waiting_names
from frostline.models.lazy_weights import FROZEN_PARTS, VAE_ENCODER, PartWeights, empty_parameters
from frostline.models.precision import precision_name
from frostline.models.quantization.linear import quantise_layers
from frostline.models.wan.components import WanComponents

from .checkpoint_files import WanFiles, find_files
from .formats.foreign import stand_in_kind
from .formats.network import NetworkFiles
from .quantised_reading import NetworkRead, StoredLayers

if TYPE_CHECKING:
    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer
    from torch import nn

    from .checkpoint_files import Entry

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# Parts that training computes with a gradient; callers that only run other parts do not need their weights.
LIVE_PARTS = ("denoiser", "vae_decoder")
DENOISERS = ("denoiser", "denoiser_high_noise")
# Exceptions of diffsynth's classes and torch for tensors that do not match the network.
_MISFITS = (RuntimeError, ValueError, TypeError, OSError, LookupError, ArithmeticError, AssertionError)


def load_components(
    model: str | Path | Sequence[Entry],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    defer: Collection[str] = (),
    reads: Mapping[str, NetworkRead] | None = None,
    storage: Mapping[str, str] | None = None,
    offload_blocks: int = 0,
) -> WanComponents:
    """Load a Wan model, frozen, in eval mode.

    The part in each file is detected from its tensor names, in Wan's or diffusers' format; sizes are inferred from
    shapes. A folder therefore does not have to follow a layout exactly.

    Args:
        model: `tiny`, `tiny-moe` (two experts) or `tiny-ti2v` (fixed first frame); a folder as in Wan's releases
            (denoiser, or `low_noise_model/` and `high_noise_model/`; VAE, text encoder, `google/umt5-xxl/`, and CLIP if
            the denoiser uses it); a folder in diffusers' layout (`model_index.json`, `transformer/`, …); or a list of
            files, of shards of one network, of diffsynth `ModelConfig`s with a `path`, and of the tokenizer's folder.
            In a list, `high` and `low` in the names identify two experts.
        defer: parts of `FROZEN_PARTS` to leave on disk until they are needed (see `WanComponents.weights`), and parts
            of `LIVE_PARTS` to leave there permanently (`vae_decoder` only together with `vae_encoder`).
        reads: readers of networks whose weights differ from those in the files, by field.
        storage: storage format (`int8`, `fp8` or `nf4`) of the linear layers in a network's blocks, by field.
        offload_blocks: number of blocks of each denoiser whose weights are kept in main memory; the other weights are
            on `device`.
    Raises:
        ConfigError: parts are missing (the message lists what was found), a file does not match, or `dtype` is not
            supported.
    """
    _ = precision_name(dtype)  # raises if the dtype is not supported
    files, reads, storage = find_files(model), reads or {}, storage or {}
    log.info("loading %s: %s, %d networks", files.spec.name, files.variant, len(files.networks))
    log.debug("%s", files)
    loaded: dict[str, Any] = {}
    for field in files.networks:
        if field == "vae" and "vae_encoder" in defer:
            loaded[field] = _vae_without_encoder(files, dtype, device, with_decoder="vae_decoder" not in defer)
        elif field in defer:
            loaded[field] = _without_weights(files, field, dtype, device, storage.get(field))
        else:
            offloaded = offload_blocks if field in DENOISERS else 0
            loaded[field] = _load(files, field, dtype, device, reads.get(field), storage.get(field), offloaded)
    loaded["vae"].scale = [part.to(device) for part in loaded["vae"].scale]
    for module in loaded.values():
        module.eval().requires_grad_(False)
    return WanComponents(
        files.spec,
        tokenizer=_load_tokenizer(files.tokenizer, files.spec.text_length),
        weights=_frozen_weights(files, loaded, dtype, device, reads, offload_blocks),
        offload_blocks=offload_blocks,
        **loaded,
    )


def _load(
    files: WanFiles,
    field: str,
    dtype: torch.dtype,
    device: str | torch.device,
    how: NetworkRead | None,
    kind: str | None,
    offload_blocks: int,
) -> Any:
    network = files.networks[field]
    try:
        # Equivalent to diffsynth's `load_model`, whose import takes several seconds because it imports torch's
        # compiler.
        module = files.spec.build(field)
    except _MISFITS as error:
        raise ConfigError(f"{network} cannot be loaded: {error}") from error
    if kind is not None:
        quantise_layers(module, kind, dtype)
    waiting = waiting_names(module, offload_blocks) if offload_blocks else frozenset()
    state_dict = _read_placed(network, dtype, device, how, StoredLayers.of(module), waiting)
    try:
        module.load_state_dict(state_dict, assign=True)
        module.to(dtype)
        stay = {id(module.get_parameter(name)) for name in waiting}
        return module._apply(lambda tensor: tensor if id(tensor) in stay else tensor.to(device))
    except _MISFITS as error:
        names = map(str, network.paths)
        first_lines = " ".join(str(error).split("\n")[:3])
        raise ConfigError(f"{', '.join(names)} cannot be loaded: {first_lines}") from error


def check_files(model: str | Path | Sequence[Entry]) -> None:
    """Check that `load_components` can load a model, without reading weights: tensor names, shapes, tokenizer.

    Raises:
        ConfigError: see `load_components`.
    """
    files = find_files(model)
    for field in files.networks:
        _empty_network(files, field)
    _load_tokenizer(files.tokenizer, files.spec.text_length)


def _without_weights(
    files: WanFiles, field: str, dtype: torch.dtype, device: str | torch.device, kind: str | None
) -> Any:
    module = _empty_network(files, field)
    if kind is not None:
        quantise_layers(module, kind, dtype)
    empty_parameters(module, dtype, device)
    return module


def _vae_without_encoder(
    files: WanFiles, dtype: torch.dtype, device: str | torch.device, with_decoder: bool
) -> nn.Module:
    module = _empty_network(files, "vae")
    if with_decoder:
        decoder = _read(files.networks["vae"], dtype, device, None, None, lambda name: not name.startswith(VAE_ENCODER))
        module.load_state_dict(decoder, strict=False, assign=True)
    empty_parameters(module, dtype, device)
    return module


def _empty_network(files: WanFiles, field: str) -> nn.Module:
    """Return one of the networks on the meta device.

    Raises:
        ConfigError: its tensors do not match those in the files.
    """
    network = files.networks[field]
    try:
        module = files.spec.build(field)
    except _MISFITS as error:
        raise ConfigError(f"{network} cannot be loaded: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = _named_as_in_module(network, network.shapes)
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if odd:
        first = odd[0]
        what = f"has shape {found.get(first)}, not {wanted.get(first)}"
        what = "is missing" if first not in found else what if first in wanted else "is unknown"
        more = f", and {len(odd) - 1} more tensors do not match" if len(odd) > 1 else ""
        raise ConfigError(f"{network} cannot be loaded: {first} {what}{more}")
    return module


def _read(
    network: NetworkFiles,
    dtype: torch.dtype,
    device: str | torch.device,
    how: NetworkRead | None,
    stored: StoredLayers | None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """Read weights by their names in the module.

    Args:
        stored: layers to store in fewer bits.
        wanted: names to return, if neither `how` nor `stored` needs all weights.
    """
    if stored is not None:
        return dict(stored.read(network, dtype, device, how))
    if how is not None:
        return _named_as_in_module(network, dict(how.read(network, dtype, device)))
    return _named_as_in_module(network, network.read(dtype, device, lambda name: wanted(_wrapper(network) + name)))


def _read_placed(
    network: NetworkFiles,
    dtype: torch.dtype,
    device: str | torch.device,
    how: NetworkRead | None,
    stored: StoredLayers | None,
    waiting: Collection[str],
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """Read weights as `_read` does; those in `waiting` are offloaded and stay in main memory."""
    if not waiting:
        return _read(network, dtype, device, how, stored, wanted)
    return placed(_read(network, dtype, "cpu", how, stored, wanted), waiting, device)


def _wrapper(network: NetworkFiles) -> str:
    return "model." if network.part in ("vae", "image_encoder") else ""


def _named_as_in_module(network: NetworkFiles, values: Mapping[str, _T]) -> dict[str, _T]:
    """Return tensors by their names in diffsynth's class, without CLIP's text tower, which is not used."""
    wrapper = _wrapper(network)
    return {wrapper + name: value for name, value in values.items() if not name.startswith("textual.")}


def _frozen_weights(
    files: WanFiles,
    loaded: dict[str, Any],
    dtype: torch.dtype,
    device: str | torch.device,
    reads: Mapping[str, NetworkRead],
    offload_blocks: int,
) -> dict[str, PartWeights]:
    weights = {}
    sources = {**files.networks, "vae_encoder": files.networks["vae"]}
    for part in FROZEN_PARTS:
        network = sources.get(part)
        if network is None:
            continue
        module: nn.Module = loaded["vae" if part == "vae_encoder" else part]
        parameters = dict(module.named_parameters())
        if part == "vae_encoder":
            # The file also contains the decoder.
            parameters = {name: p for name, p in parameters.items() if name.startswith(VAE_ENCODER)}
        stored = StoredLayers.of(module)
        if stored is None:
            shapes = _named_as_in_module(network, network.shapes)
            nbytes = dtype.itemsize * sum(math.prod(shapes[name]) for name in parameters)
        else:
            sized = files.spec.build(part).to(dtype)
            quantise_layers(sized, stored.kind, dtype)
            nbytes = sum(parameter.nbytes for parameter in sized.parameters())
        how = reads.get(part)
        waiting = waiting_names(module, offload_blocks) if part in DENOISERS and offload_blocks else frozenset()
        read = partial(_read_placed, network, dtype, device, how, stored, waiting, parameters.__contains__)
        if how is None:
            weights[part] = PartWeights(parameters, read, network.paths, nbytes)
        else:
            read_from, code = (*network.paths, *how.files), (type(how).__module__,)
            weights[part] = PartWeights(parameters, read, read_from, nbytes, how.identity, code)
    return weights


def _load_tokenizer(folder: Path, text_length: int) -> HuggingfaceTokenizer:
    with deferred_init("diffsynth"):
        from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer

    try:
        return HuggingfaceTokenizer(str(folder), seq_len=text_length, clean="whitespace")
    except Exception as error:  # transformers raises many types of exceptions
        for path in sorted(folder.iterdir()):
            if path.is_file() and (kind := stand_in_kind(path)):
                raise ConfigError(f"{path} cannot be read: it is {kind}") from error
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"the tokenizer in {folder} cannot be read: {first_line}") from error
