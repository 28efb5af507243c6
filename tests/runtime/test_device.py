"""The device that a name stands for, and the messages about names of no device."""

import pytest
import torch

from frostline.errors import ConfigError
from frostline.runtime.device import resolve_device


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "", "cpu,cuda"])
def test_names_of_no_device(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device: '{name}' is not supported: use auto, cpu"):
        resolve_device(name)


def test_devices_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="finds no GPU"):
        resolve_device("cuda")


def test_devices_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"torch finds 2 GPU\(s\): use an index below 2"):
        resolve_device("cuda:2")
