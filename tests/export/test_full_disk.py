"""Engine folders on a full disk: the error names the cause, no half-built engine is left, and the process continues."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from frostline.errors import EngineError
from frostline.export.exporter import export_stage
from frostline.runtime.backends import get_backend
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.stage import Network, Stage, TensorSpec

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk"),
    pytest.mark.timeout(600),
]


class Layers(nn.Module):
    """A network whose weights, and code when it is compiled, fill a disk of a few kilobytes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


# Each test runs in a new process, because torch's package writer can end the process if the disk is full.
@pytest.mark.fresh_process
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "aotinductor"])
def test_a_full_disk_is_said_and_the_process_lives(backend: str, tmp_path: Path) -> None:
    if reason := get_backend(backend).unavailable():
        pytest.skip(reason)
    network = Network("layers", Layers().eval(), (TensorSpec("x", (Dimension("rows", 1, 4, 64), 64)),), ("y",))
    stage = Stage(name="layers", model="toy", networks=(network,), tolerance=Tolerance(1e-5, 1e-5, 0.999))
    with small_disk(tmp_path / "disk", "8k") as root:
        store = EngineStore(root)
        with pytest.raises(EngineError, match=r"the disk is full\. Free some space, or use another disk"):
            export_stage(stage, backend, store)
        assert store.find() == []
        assert [path.suffix for path in (root / "toy" / "layers").iterdir()] == [".lock"]
    assert export_stage(stage, backend, EngineStore(tmp_path / "engines")).manifest.verified
