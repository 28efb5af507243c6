"""Train LoRA adapters of Wan video models on reward feedback, with the frozen stages compiled into engines."""

__version__ = "0.1.0"
