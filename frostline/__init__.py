"""Reward-feedback LoRA training of Wan video models with the frozen stages in engines."""

__version__ = "0.1.0"
