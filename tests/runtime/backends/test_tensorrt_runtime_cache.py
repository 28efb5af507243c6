"""Kernels that TensorRT-RTX compiles when it runs are stored next to the engine; only signed files are loaded."""

from pathlib import Path

import pytest
import torch
from cuda_standin import TensorRTRTX, install
from torch import nn

from frostline.runtime.backends.tensorrt.runner import TensorRTRunner
from frostline.runtime.backends.tensorrt.runtime_cache import RuntimeCache
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines import signing
from frostline.runtime.engines.manifest import Artifact, Manifest
from frostline.runtime.engines.verification import VerifiedEngine
from frostline.runtime.stage import Network, TensorSpec

CPU = torch.device("cpu")


def engine_at(folder: Path, sha256: str = "0" * 64) -> VerifiedEngine:
    manifest = Manifest(
        stage="s", model="m", backend="tensorrt-rtx", precision="fp32", key="key", weights_sha256="1" * 64,
        device="sm_89", artifacts={"n.plan": Artifact(sha256=sha256, bytes=4)},
    )  # fmt: skip
    return VerifiedEngine(folder / "tensorrt-rtx-key", manifest)


@pytest.fixture
def cache(tmp_path: Path) -> RuntimeCache:
    return RuntimeCache(engine_at(tmp_path), "n.plan")


def runner_of(monkeypatch: pytest.MonkeyPatch, cache: RuntimeCache) -> tuple[TensorRTRTX, TensorRTRunner]:
    trt = install(monkeypatch, TensorRTRTX())
    x = TensorSpec("x", (Dimension("n", 1, 2, 64), 4))
    network = Network("n", nn.Linear(4, 4), (x,), ("y",), {"live": torch.ones(1)}, (TensorSpec("live", (1,)),))
    return trt, TensorRTRunner(trt, b"plan", network, CPU, cache)


def test_what_was_compiled_is_there_for_the_next_process(
    cache: RuntimeCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, runner = runner_of(monkeypatch, cache)
    runner(x=torch.zeros(3, 4))
    assert [path.name for path in tmp_path.iterdir()] == [".tensorrt-rtx-key.n.plan.runtime_cache"]
    assert cache.read() == b"this GPU\n(3, 4)"
    trt, runner = runner_of(monkeypatch, cache)
    assert trt.caches[0].lines == [b"(3, 4)"]
    runner(x=torch.zeros(5, 4))
    assert cache.read() == b"this GPU\n(3, 4)\n(5, 4)"


def test_it_is_written_ever_less_often(cache: RuntimeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    _, runner = runner_of(monkeypatch, cache)
    written, write = [], cache.write
    monkeypatch.setattr(cache, "write", lambda content: (written.append(content), write(content)))
    for _ in range(2):
        for rows in range(1, 21):
            runner(x=torch.zeros(rows, 4))
    assert len(written) == 5, "the file must be written after 1, 2, 4, 8 and 16 shapes"


def test_of_another_gpu_it_is_replaced(cache: RuntimeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(b"another GPU\n(9, 4)")
    trt, runner = runner_of(monkeypatch, cache)
    assert trt.caches[0].lines == []
    runner(x=torch.zeros(3, 4))
    assert cache.read() == b"this GPU\n(3, 4)"


def test_what_someone_else_wrote_is_not_loaded(
    cache: RuntimeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write(b"this GPU\n(3, 4)")
    data = cache.path.read_bytes()
    assert RuntimeCache(engine_at(tmp_path, "2" * 64), "n.plan").read() is None, "the file belongs to another engine"
    for other in (data[:-1], data[:-1] + b"]", b"this GPU", b"\xff" * 100, b"0" * 64 + data[64:]):
        cache.path.write_bytes(other)
        caplog.clear()
        trt, _ = runner_of(monkeypatch, cache)
        assert trt.caches[0].lines == []
        assert "is not signed with your key" in caplog.text
    cache.path.unlink()
    (tmp_path / "elsewhere").write_bytes(data)
    cache.path.symlink_to(tmp_path / "elsewhere")
    assert cache.read() is None


def test_where_it_cannot_be_written_the_engine_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    _, runner = runner_of(monkeypatch, RuntimeCache(engine_at(tmp_path / "file"), "n.plan"))
    torch.testing.assert_close(runner(x=torch.zeros(3, 4))["y"], torch.ones(3, 4))

    def no_key(data: bytes) -> str:
        raise signing.EngineError("signing key cannot be read")

    monkeypatch.setattr(signing, "sign", no_key)
    _, runner = runner_of(monkeypatch, RuntimeCache(engine_at(tmp_path), "n.plan"))
    runner(x=torch.zeros(3, 4))
