"""Loading an adapter into a model: all of it, or the model stays unchanged."""

from pathlib import Path

import pytest
import torch
from adapter_files import make_adapter, output, tiny_denoiser
from safetensors.torch import load_file, save_file

from frostline.errors import ConfigError
from frostline.models.lora.inject import copy_adapter, inject_lora, load_adapter, lora_layers


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    make_adapter(tmp_path, 4)
    model = tiny_denoiser()
    before, names = output(model), [name for name, _ in model.named_modules()]
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    last = sorted(tensors)[-1]
    for change in ({last: tensors[last][:3].clone()}, {f"{last}.more": torch.zeros(1)}, {last: torch.zeros(0)}):
        save_file({**tensors, **change}, weights)
        with pytest.raises(ConfigError, match="adapter_model"):
            load_adapter(model, tmp_path)
        assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(output(model), before)
    save_file(tensors, weights)
    load_adapter(model, tmp_path)
    assert len(lora_layers(model)) == 40


def test_copying_into_other_layers_is_refused(tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path, 4)
    model = tiny_denoiser()
    inject_lora(model, 8)
    with pytest.raises(ConfigError, match="the model requires"):
        copy_adapter(model, adapter.uniform())
