"""Too little memory while an engine is loaded: the results are right, from engine or PyTorch, and no process dies."""

import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from frostline.export.exporter import export_stage
from frostline.runtime.backends import get_backend
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import Network, Stage, TensorSpec

RIGHT, WRONG, REFUSED = 10, 20, 30
SERVED_BY_TORCH = 1
# The memory in bytes that a process may still allocate when it starts to load.
LIMITS = tuple(mebibytes * 2**20 for mebibytes in (4, 16, 64, 1024))


def child(work: object, *arguments: object) -> int:
    """Run `work` in a forked process; return the exit code, which `work` returns there."""
    process = os.fork()
    if process == 0:
        code = 99
        try:
            code = work(*arguments)  # type: ignore[operator]
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def build(stage: Stage, backend: str, root: Path) -> int:
    return 0 if export_stage(stage, backend, EngineStore(root)).manifest.verified else 1


def serve(stage: Stage, backend: str, root: Path, limit: int) -> int:
    runtime = Runtime({stage.name: stage}, backend, root)
    inputs = stage.cases()["sample"].inputs
    expected = stage.torch(inputs)
    with Path("/proc/self/statm").open() as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.RLIM_INFINITY))
    try:
        outputs = runtime.run(stage.name, inputs)
    except (MemoryError, RuntimeError):
        return REFUSED
    same = all(torch.allclose(outputs[name], expected[name], atol=1e-5) for name in expected)
    return (RIGHT if same else WRONG) + SERVED_BY_TORCH * (runtime.plan[stage.name].backend == "torch")


@pytest.mark.fresh_process
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "aotinductor"])
def test_what_serves_is_right_with_any_memory(backend: str, tmp_path: Path) -> None:
    if reason := get_backend(backend).unavailable():
        pytest.skip(reason)
    torch.set_num_threads(1)
    module = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).eval()
    network = Network("layers", module, (TensorSpec("x", (Dimension("rows", 1, 4, 64), 512)),), ("y",))
    stage = Stage(name="layers", model="toy", networks=(network,), tolerance=Tolerance(1e-5, 1e-5, 0.999))
    assert child(build, stage, backend, tmp_path) == 0
    codes = [child(serve, stage, backend, tmp_path, limit) for limit in LIMITS]
    assert {*codes} <= {RIGHT, RIGHT + SERVED_BY_TORCH, REFUSED}, codes
    assert codes[-1] == RIGHT, "with enough memory, the engine must run"
