"""Loaders of ONNX files use the bytes whose hash was checked, even if the file is replaced afterwards."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from frostline.export.exporter import build_stage
from frostline.runtime.backends import get_backend
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.engines.verification import VerifiedEngine
from frostline.runtime.stage import Network, Stage, TensorSpec


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_file_that_is_exchanged_after_the_check_is_not_opened(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := get_backend(backend).unavailable():
        pytest.skip(reason)
    network = Network("layer", nn.Linear(4, 4).eval(), (TensorSpec("x", (Dimension("rows", 1, 4, 64), 4)),), ("y",))
    stage = Stage(name="layer", model="toy", networks=(network,), tolerance=Tolerance(1e-5, 1e-5, 0.999))
    engine, _ = build_stage(stage, backend, EngineStore(tmp_path))
    other, _ = build_stage(
        replace(stage, networks=(replace(network, module=nn.Linear(4, 4).eval()),)), backend, EngineStore(tmp_path)
    )
    read = VerifiedEngine.read

    def read_and_exchange(self: VerifiedEngine, name: str) -> bytes:
        content = read(self, name)
        (other.path / name).replace(self.path / name)
        return content

    monkeypatch.setattr(VerifiedEngine, "read", read_and_exchange)
    runner = get_backend(backend).load(engine, {"layer": network}, torch.device("cpu"))["layer"]
    inputs = network.samples("opt")
    torch.testing.assert_close(runner(**inputs)["y"], network.reference(inputs)["y"], atol=1e-6, rtol=0)
