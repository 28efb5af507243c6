"""PEFT's config of an adapter: in a separate file, or in the header of the weights file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.errors import ConfigError
from frostline.models.checkpoints.formats.settings_files import parse_json

if TYPE_CHECKING:
    from peft import LoraConfig

# Key of PEFT's config, as JSON, in the metadata of files that diffusers wrote (`loaders/lora_base.py`), and the prefix
# of its fields.
METADATA, _OF_DENOISER = "lora_adapter_metadata", re.compile(r"transformer(?:_2)?\.(.+)")
# Prefix of the values of `init_lora_weights` for which PEFT removes a part of the base weights when training starts
# (`peft/tuners/lora/layer.py`): the matrices then contain that part.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Fields that make a layer compute something other than `W x + alpha / rank * B A x`.
_COMPUTES_ELSE = (
    *("use_rslora", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "trainable_token_indices"),
)


@dataclass(frozen=True)
class Stated:
    """PEFT's config of an adapter.

    Attributes:
        where: name of its source in messages.
    """

    config: LoraConfig
    where: str

    def alpha(self, layer: str) -> float:
        """Return the alpha of a layer, by its name in the file."""
        return self._of(layer, self.config.alpha_pattern, self.config.lora_alpha)

    def check(self, ranks: Mapping[str, int], path: Path) -> None:
        """Check that PEFT, given this config, would load all matrices of `path`.

        Args:
            ranks: by the names of the layers in the file.
        Raises:
            ConfigError: the config states other ranks, or does not target a layer.
        """
        from peft.tuners.tuners_utils import check_target_module_exists

        for layer, rank in ranks.items():
            said = self._of(layer, self.config.rank_pattern, self.config.r)
            if rank != said:
                raise ConfigError(f"{path} has rank {rank}, but {self.where} states {said:g} ({layer})")
        # A target may also be a weight; its matrices are those of the layer.
        weights = tuple(f".{name}" for name in self.config.target_parameters or ())
        for layer in ranks:
            if not check_target_module_exists(self.config, layer) and not f".{layer}.weight".endswith(weights):
                raise ConfigError(
                    f"{self.where} does not target {layer}, so PEFT would ignore its matrices in {path}: "
                    "correct the config, or remove them from the file"
                )

    def _of(self, layer: str, pattern: Mapping[str, float] | None, default: float) -> float:
        from peft.utils.other import get_pattern_key

        try:
            return (pattern or {}).get(get_pattern_key(tuple(pattern or ()), layer), default)
        except re.error as error:
            raise ConfigError(f"{self.where}: rank_pattern and alpha_pattern cannot be read: {error}") from error


def read_alpha(value: object, where: str) -> float:
    """Return the alpha of a layer, or of all layers.

    Args:
        where: name of the source in messages.
    Raises:
        ConfigError: the value is not a positive number or its text.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{where} must be a positive number, not {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{where} must be a positive number, not {_shown(value)}")
    return value


def stated_in_header(metadata: Mapping[str, str], path: Path) -> Stated | None:
    """Return the config that diffusers stores in the header of a file; None if there is none.

    Its fields have the denoiser's name as prefix, or no prefix in a file of a single model.

    Metadata of kohya's programs (`ss_network_alpha`) is ignored: it describes the training, and their converter does
    not change it when it multiplies alpha into the matrices.

    Raises:
        ConfigError: see `state`.
    """
    text = metadata.get(METADATA)
    if not text:
        return None
    where = f"{METADATA} of {path}"
    settings = parse_json(text, where)
    own = {match[1]: value for name, value in settings.items() if (match := _OF_DENOISER.fullmatch(name))}
    return state(own or settings, where)


def state(settings: Mapping[str, Any], where: str) -> Stated:
    """Parse the fields of PEFT's `LoraConfig`; `where` names their source in messages.

    Raises:
        ConfigError: the fields are invalid; the adapter is not two matrices per layer on unchanged base weights; or a
            rank or alpha is not a number.
    """
    from peft import LoraConfig

    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        way = (
            "merge it with PEFT (merge_and_unload) and use the merged model"
            if start == "loftq"  # it also rounds, so no matrices can undo its effect
            else "convert it to an ordinary LoRA with PEFT's save_pretrained and "
            "path_initial_model_for_weight_conversion"
        )
        raise ConfigError(
            f"{where}: init_lora_weights {start!r} is not supported because it changes the base weights: {way}"
        )
    try:
        config = LoraConfig.from_peft_type(**{**settings, **_numbers(settings, where)})
    except ConfigError:
        raise
    except Exception as error:  # peft raises many types of exceptions
        raise ConfigError(f"{where} cannot be read: {error}") from error
    if not isinstance(config, LoraConfig) or not config.target_modules:
        raise ConfigError(f"{where} is not a LoRA config with target_modules")
    for name in _COMPUTES_ELSE:
        if getattr(config, name, None):
            raise ConfigError(f"{where}: {name} is not supported")
    return Stated(config, where)


def _numbers(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of ranks and alphas, with their values converted to numbers."""
    numbers: dict[str, Any] = {}
    if "lora_alpha" in settings:
        numbers["lora_alpha"] = read_alpha(settings["lora_alpha"], f"{where}: lora_alpha")
    if "r" in settings:
        numbers["r"] = _read_rank(settings["r"], f"{where}: r")
    for name, read in (("alpha_pattern", read_alpha), ("rank_pattern", _read_rank)):
        pattern = settings.get(name)
        if not pattern:
            continue
        if not isinstance(pattern, dict):
            raise ConfigError(f"{where}: {name} must be a mapping of layers")
        numbers[name] = {layer: read(value, f"{where}: {name} of {layer}") for layer, value in pattern.items()}
    return numbers


def _read_rank(value: object, where: str) -> int:
    rank = read_alpha(value, where)
    if rank != int(rank):
        raise ConfigError(f"{where} must be a whole number, not {_shown(value)}")
    return int(rank)


def _shown(value: object) -> str:
    return "null" if value is None else repr(value)
