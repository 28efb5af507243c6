"""The reward in the documentation runs as it is printed."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from steps import QUICK, small_clips

from frostline.train import WanTrainingModule

PAGE = Path(__file__).parents[2] / "docs" / "rewards" / "README.md"


def test_it_trains_as_it_is_printed(
    make_module: Callable[..., WanTrainingModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## A reward of your own")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert "class Brightness(Reward)" in code
    (tmp_path / "documented_reward.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        entry = {"type": "documented_reward:Brightness", "weight": 0.1, "options": {"offset": 0.1}}
        module = make_module(rewards=[entry], **QUICK)
        loss, score, kl_loss = module(small_clips(1))
        loss.backward()
        module.rewards[0].reward.offset = 0.0  # type: ignore[attr-defined]
        _, without, _ = module(small_clips(1))
    finally:
        sys.modules.pop("documented_reward", None)
    torch.testing.assert_close(score - without, torch.tensor(0.1), atol=1e-6, rtol=0)
    torch.testing.assert_close(loss.detach(), -0.1 * score + module.settings.kl_weight * kl_loss)
    gradients = [parameter.grad for parameter in module.trainable_parameters().values()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient is not None and gradient.any() for gradient in gradients)
