"""A training step with a small checkpoint of every variant, in the layout of its release."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LAYOUTS, VARIANTS, make_tensors

from frostline.train import WanTrainingModule

SETTINGS: dict[str, Any] = {"lora": {"rank": 4}, "num_inference_steps": 3, "grad_start_step": 1, "grad_end_step": 2}


@pytest.mark.parametrize(
    ("name", "layout", "size", "latents"),
    [
        ("Wan2.1-T2V", "official", 48, (16, 2, 6, 6)),
        ("Wan2.1-I2V", "diffusers", 48, (16, 2, 6, 6)),
        ("Wan2.2-I2V-A14B", "files", 48, (16, 2, 6, 6)),
        # 48 is not a multiple of 32, so it is resized to 64; the VAE encodes this to 4.
        ("Wan2.2-TI2V", "diffusers", 48, (48, 2, 4, 4)),
    ],
)
def test_a_step_of_every_variant(name: str, layout: str, size: int, latents: tuple[int, ...], tmp_path: Path) -> None:
    model: Any = LAYOUTS[layout](tmp_path / name, VARIANTS[name], make_tensors(VARIANTS[name]))
    module = WanTrainingModule.from_pretrained(model, engines=None, plan="torch", **SETTINGS)
    # With a LoRA of B = 0, the KL term and the gradient of A are zero.
    for parameter in module.trainable_parameters().values():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    data = {"prompt": ["a person nods"], "video": torch.rand(1, 5, 3, size, size)}
    conditioning = module.forward_preprocess(data)
    assert conditioning.latent_shape == latents
    loss, _, _ = module(data, inputs=conditioning)
    assert torch.isfinite(loss)
    loss.backward()
    for parameter in module.trainable_parameters().values():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().max() > 0
