"""PEFT's LoRA on a layer whose frozen weight is stored in 8 or 4 bits."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear

from frostline.errors import ConfigError


class QuantisedLoraLinear(Linear):
    """PEFT's layer without merging: the result would be written to a dequantised copy and lost."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> Any:
        """Raise an error.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a LoRA cannot be merged into quantised weights: save the adapter, and merge it into "
            "the model's files with `frostline adapter merge`"
        )
