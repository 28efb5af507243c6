"""Fixtures: ONNX files of the small model, and one signing key for engines that several tests use."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_model import network_of

from frostline.export.tracing.onnx import trace_onnx

Source = Callable[..., Path]


@pytest.fixture(autouse=True)
def signing_key(session_signing_key: Path) -> Path:
    """Use one key for all tests of this folder, because their engines are used by several tests."""
    return session_signing_key


@pytest.fixture(scope="session")
def onnx_source(tmp_path_factory: pytest.TempPathFactory, session_folder: Path) -> Source:
    """`onnx_source(stage, network, dtype)`: return a copy of an ONNX file; each network is traced once."""
    traced = session_folder / "traced"
    traced.mkdir(parents=True, exist_ok=True)

    def source(stage: str, name: str, dtype: torch.dtype = torch.float32) -> Path:
        path = traced / f"{stage}-{name}-{str(dtype).removeprefix('torch.')}.onnx"
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                partial = path.with_name(f"partial-{path.name}")
                trace_onnx(network_of(stage, name, dtype), partial)
                partial.rename(path)
        return Path(shutil.copy(path, tmp_path_factory.mktemp("source") / f"{name}.onnx"))

    return source
