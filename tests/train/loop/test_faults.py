"""Faults during a run: if the disk is full or an engine is damaged, the run reports an error or continues."""

import json
import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from steps import Clips

from frostline.errors import CheckpointError, ConfigError, EngineError, TrainingError
from frostline.train.loop.resume import find_resume
from frostline.train.loop.sharding import shard_frozen_weights
from frostline.train.loop.trainer import RunOptions, train
from frostline.train.loop.validation import Validation, validate
from frostline.train.settings import TrainerSettings

QUICK: dict[str, Any] = {
    "num_inference_steps": 3,
    "grad_start_step": 1,
    "grad_end_step": 2,
    "rewards": [{"type": "sharpness", "baseline": 0.0, "scale": 1.0}],
}


def run(module: Any, out: Path, resume: bool = False) -> Any:
    settings = TrainerSettings(learning_rate=1e-3, max_train_steps=2, checkpointing_steps=1)
    return train(
        module,
        Clips(count=2, seed=11),
        settings,
        out,
        RunOptions(resume=find_resume(out, "latest") if resume else None, restart=resume),
    )


@contextmanager
def files_no_larger_than(limit: int) -> Iterator[None]:
    """Limit the size of files within the block; then writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The adapter is smaller than the optimizer state, so each of the two files can be the one that cannot be written.
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_a_full_disk_loses_nothing(file: str, make_module: Any, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(make_module(**QUICK), whole)
    needed = (whole / "checkpoint-2" / file).stat().st_size
    with (
        files_no_larger_than(needed - 1),
        pytest.raises(CheckpointError, match=r"checkpoint-1 cannot be written: .*arge"),
    ):
        run(make_module(**QUICK), out)
    assert [path.name for path in out.iterdir() if "checkpoint" in path.name] == []
    # With free space, a run without a checkpoint starts again, any number of times; a run with one is resumed.
    with (
        files_no_larger_than(needed - 1),
        pytest.raises(CheckpointError, match="checkpoint-1 cannot be written"),
    ):
        run(make_module(**QUICK), out, resume=True)
    assert run(make_module(**QUICK), out, resume=True).step == 2
    shutil.rmtree(out / "checkpoint-2")
    with (
        files_no_larger_than(needed - 1),
        pytest.raises(CheckpointError, match=r"the last complete checkpoint is .*checkpoint-1"),
    ):
        run(make_module(**QUICK), out, resume=True)
    assert run(make_module(**QUICK), out, resume=True).step == 2
    for name in (file, "state.json"):
        assert (out / "checkpoint-2" / name).read_bytes() == (whole / "checkpoint-2" / name).read_bytes()


def test_a_damaged_engine_is_not_used(
    make_module: Any, engines: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "engines"
    shutil.copytree(engines / "tiny" / "denoiser", store / "tiny" / "denoiser")
    for graph in store.rglob("*.onnx"):
        content = bytearray(graph.read_bytes())
        content[len(content) // 2] ^= 1
        graph.write_bytes(content)
    plan = {"denoiser": "onnxruntime"}
    module = make_module(plan={**dict.fromkeys(make_module(**QUICK).stages, "torch"), **plan}, engines=store, **QUICK)
    with pytest.raises(EngineError, match="hash"):
        run(module, tmp_path / "strict")
    everything = dict.fromkeys(module.stages, "torch")
    module = make_module(plan={**everything, **plan}, engines=store, strict=False, **QUICK)
    with caplog.at_level(logging.WARNING):
        assert run(module, tmp_path / "run").step == 2
    assert "backend onnxruntime failed, using torch from now on" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["stages"]["denoiser"]["backend"] == "torch"


@pytest.mark.parametrize(
    ("kind", "said"),
    [(DistributedType.DEEPSPEED, "DeepSpeed is not supported"), (DistributedType.FSDP, "FSDP1 is not supported")],
)
def test_ways_to_distribute_that_are_not_supported_are_refused(
    kind: DistributedType, said: str, make_module: Any
) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=kind, is_fsdp2=False)
    with pytest.raises(ConfigError, match=f"{said}.*use FSDP2"):
        shard_frozen_weights(make_module(**QUICK), accelerator)


def test_a_model_that_has_diverged_is_called_so(make_module: Any, tmp_path: Path) -> None:
    module = make_module(**QUICK)
    with torch.no_grad():
        for parameter in module.trainable_parameters().values():
            parameter.fill_(torch.inf)
    starts = Validation(Clips(count=1, seed=11), [0])
    with pytest.raises(TrainingError, match=r"validation at step 7: .*diverged.*learning_rate"):
        validate(module, starts, 7, tmp_path)
    assert not list(tmp_path.iterdir())
