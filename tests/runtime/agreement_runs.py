"""One of two processes: write which backend runs the stage in this process, and how an engine failed.

python agreement_runs.py ENGINES OUT
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_guard import ORT, rows, scaled_stage
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from frostline.errors import EngineError
from frostline.runtime.backends.onnxruntime import OnnxRuntimeRunner
from frostline.runtime.runtime import Runtime


def main() -> None:
    rank, engines, out = int(os.environ["RANK"]), Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    found = {}
    for case, own in {"alike": engines, "apart": engines if rank == 0 else out / "nothing"}.items():
        runtime = Runtime({"scaled": scaled_stage()}, ORT, own)
        runtime.agree_across_processes()
        found[case] = runtime.plan["scaled"].backend
    stage = scaled_stage()
    runtime = Runtime({"scaled": stage}, ORT, engines)
    runtime.agree_across_processes()
    fully_shard(stage.networks[0].module.linear, mesh=init_device_mesh("cpu", (2,)))
    found["sharded"] = list(runtime["scaled"](x=rows())["y"].shape)
    if rank == 1:

        def fail(self: OnnxRuntimeRunner, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            raise RuntimeError("broken")

        OnnxRuntimeRunner.__call__ = fail  # type: ignore[method-assign]
    try:
        runtime["scaled"](x=rows())
        found["failure"] = ""
    except EngineError as error:
        found["failure"] = str(error)
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
