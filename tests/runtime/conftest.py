"""Fixtures: engines to store, and a separate signing key for each test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import set_external_data

from frostline.runtime.engines.manifest import Manifest, NetworkInput, NetworkOutput, NetworkRecord
from frostline.runtime.engines.store import EngineStore, VerifiedEngine

KEY = "0123456789abcdef"

BuildEngine = Callable[..., VerifiedEngine]


@pytest.fixture(autouse=True)
def signing_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config" / "signing.key"
    monkeypatch.setenv("FROSTLINE_SIGNING_KEY_FILE", str(path))
    return path


@pytest.fixture
def manifest() -> Manifest:
    """Return the manifest of an engine with the model of `add_model`, without artifacts."""
    return Manifest(
        stage="vae_encoder",
        model="tiny",
        backend="onnxruntime",
        precision="fp32",
        key=KEY,
        weights_sha256="0" * 64,
        device="cpu",
        networks=(
            NetworkRecord(
                name="add",
                artifact="model.onnx",
                inputs=(NetworkInput(name="x", dtype="float32", min=(1,), opt=(4,), max=(8,)),),
                outputs=(NetworkOutput(name="y", dtype="float32"),),
            ),
        ),
        latency_ms={"torch": 2.0, "onnxruntime": 1.0},
    )


def add_model(location: str = "model.onnx.data", *, in_subgraph: bool = False) -> bytes:
    """Return an ONNX model `y = x + w`, with `w` in external data at `location`."""
    w = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], np.ones(1, np.float32).tobytes(), raw=True)
    set_external_data(w, location)
    w.ClearField("raw_data")
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])
    nodes = [onnx.helper.make_node("Add", ["x", "w"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "add", [], [y], [w])
    if in_subgraph:
        branch = onnx.helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=graph)
        graph = onnx.helper.make_graph([branch], "branches", [], [y])
    return onnx.helper.make_model(graph).SerializeToString()


@pytest.fixture
def add_onnx() -> Callable[..., bytes]:
    return add_model


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


@pytest.fixture
def build(store: EngineStore, manifest: Manifest) -> BuildEngine:
    """Return a function that builds a small engine, whose manifest and files can be changed."""

    def build(model: bytes | None = None, **changes: object) -> VerifiedEngine:
        changed = manifest.updated(**changes)
        identity = changed.id
        with store.building(identity) as building:
            (building.folder / "model.onnx").write_bytes(model or add_model())
            (building.folder / "model.onnx.data").write_bytes(np.ones(1, np.float32).tobytes())
            return building.commit(changed)

    return build
