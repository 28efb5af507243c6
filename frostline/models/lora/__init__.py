"""LoRA adapters on disk: read from the format of any program, write in that of each, merge into base weights."""

from .adapter import Adapter, LoraPair, UniformLora
from .merging import check_fits, check_weights_file, merge_adapter, write_weights
from .reading import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from .writing import FORMATS, PEFT, write_adapter, write_peft

__all__ = [
    "CONFIG_FILE",
    "FORMATS",
    "PEFT",
    "WEIGHTS_FILE",
    "Adapter",
    "LoraPair",
    "UniformLora",
    "check_fits",
    "check_weights_file",
    "merge_adapter",
    "read_adapter",
    "write_adapter",
    "write_peft",
    "write_weights",
]
