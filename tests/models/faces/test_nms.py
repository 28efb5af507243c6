"""torchvision's kernel for non-maximum suppression gives the same results if torchvision is not imported."""

import importlib.machinery
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from frostline.errors import ConfigError
from frostline.models.faces.nms import _kernel, nms

ALONE = """
import sys, torch
from frostline.models.faces.nms import nms
boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [20, 0, 30, 9]])
kept = nms(boxes, torch.tensor([0.5, 0.9, 0.1, 0.2]), 0.5)
assert kept.tolist() == [1, 3], kept
assert "torchvision" not in sys.modules
import torchvision
assert torch.equal(torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1, 0.2]), 0.5), kept)
"""


def test_equals_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 300):
        corners = 100 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([corners, corners + 40 * torch.rand(count, 2, generator=generator)], 1)
        scores = torch.rand(count, generator=generator)
        for threshold in (0.0, 0.3, 0.7):
            assert torch.equal(nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))


def test_the_package_is_not_imported_and_can_be_later() -> None:
    subprocess.run([sys.executable, "-c", ALONE], check=True)


def test_a_torchvision_of_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C.so").write_text("no library")
    spec = importlib.machinery.ModuleSpec("torchvision", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.delitem(sys.modules, "torchvision")
    with pytest.raises(
        ConfigError, match=r"torchvision is missing or does not match torch .*_C\.so.*\): install the matching one"
    ):
        _kernel.__wrapped__()
