"""Entries of the frozen-output cache that are damaged during a run are computed again, and results do not change."""

from pathlib import Path
from typing import Any

import pytest
from steps import QUICK, Clips

from frostline.runtime import cache
from frostline.train.loop.trainer import train
from frostline.train.settings import TrainerSettings

# With two clips, all steps after the first epoch use the cache.
SETTINGS = TrainerSettings(learning_rate=1e-3, max_train_steps=6, per_device_train_batch_size=1, seed=3)


def flip_a_bit(path: Path, turn: int) -> None:
    """Flip another bit at each turn: in the header, in the digest and its signature, in the tensors."""
    content = bytearray(path.read_bytes())
    content[(turn * 997) % len(content)] ^= 1 << (turn % 8)
    path.write_bytes(content)


@pytest.mark.parametrize("plan", ["torch", "onnxruntime"])
def test_bits_that_flip_between_the_steps_change_nothing(
    plan: str, make_module: Any, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_HOT_BYTES", 0)  # otherwise, each process reads entries from disk once
    clips, adapters, modules = Clips(2, seed=11), [], {}
    for name in ("undisturbed", "disturbed"):
        folder = tmp_path / name
        modules[name] = module = make_module("tiny", plan=plan, engines=engines, cache_dir=folder / "cache", **QUICK)
        flips: list[Path] = []

        def damage(*_: object, folder: Path = folder, flips: list[Path] = flips) -> None:
            for path in sorted((folder / "cache").glob("*.safetensors")):
                flip_a_bit(path, len(flips))
                flips.append(path)

        if name == "disturbed":
            module.register_forward_pre_hook(damage)
        train(module, clips, SETTINGS, folder / "run")
        adapters.append((folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    assert (modules["undisturbed"].parts.cache.corrupted, modules["undisturbed"].parts.cache.misses) == (0, 6)
    assert modules["undisturbed"].parts.cache.hits == 12
    assert modules["disturbed"].parts.cache.corrupted >= 12
    assert modules["disturbed"].parts.cache.hits == 0
