"""LoRA adapters on disk: read and write the formats of several programs, and merge adapters into base weights."""

from .adapter import Adapter, LoraPair, UniformLora
from .experts import (
    EXPERT_PARTS,
    merged_path,
    part_path,
    read_adapters,
    read_one_adapter,
    read_trained_adapters,
    uniform_loras,
)
from .merging import check_fits, check_weights_file, merge_adapter, write_weights
from .reading import CONFIG_FILE, WEIGHTS_FILE, adapter_files, read_adapter
from .writing import FORMATS, PEFT, write_adapter, write_peft

__all__ = [
    "CONFIG_FILE",
    "EXPERT_PARTS",
    "FORMATS",
    "PEFT",
    "WEIGHTS_FILE",
    "Adapter",
    "LoraPair",
    "UniformLora",
    "adapter_files",
    "check_fits",
    "check_weights_file",
    "merge_adapter",
    "merged_path",
    "part_path",
    "read_adapter",
    "read_adapters",
    "read_one_adapter",
    "read_trained_adapters",
    "uniform_loras",
    "write_adapter",
    "write_peft",
    "write_weights",
]
