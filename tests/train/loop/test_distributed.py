"""Two processes compared with one: the same samples and gradients, and an on-policy engine in every process."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import run
from forked import run_ranks
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).parents[2] / "distributed_runs.py"


def found(out: Path) -> list[dict[str, Any]]:
    """Return what each process wrote."""
    return [json.loads((out / f"process-{index}.json").read_text()) for index in range(2)]


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def first_gradient(out: Path) -> Tensor:
    """Return the first moment of AdamW after one step, which is a tenth of the gradient."""
    moments = load_file(out / "checkpoint-1" / "optimizer.safetensors")
    return torch.cat([moments[name].flatten() for name in sorted(moments) if name.endswith("/exp_avg")]).double()


def adapter(out: Path) -> Tensor:
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double()


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, engines: Path) -> Path:
    """Start the runs in two processes; return their folder."""
    out = tmp_path_factory.mktemp("together")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    run_ranks(str(SCRIPT), str(out), str(engines), environment=environment, timeout=220)
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    run(out, "sharpness", batch_size=2)
    return out


def assert_same_run(out: Path, alone: Path) -> None:
    assert error(first_gradient(out), first_gradient(alone)) <= 1e-5
    assert error(adapter(out), adapter(alone)) <= 1e-3
    for one, other in zip(lines(out), lines(alone), strict=True):
        assert one["sample_id"] == other["sample_id"]
        assert one["score"] == pytest.approx(other["score"], rel=1e-3)
    for one, other in zip(lines(out, "validation.jsonl"), lines(alone, "validation.jsonl"), strict=True):
        assert one["starts"]["psnr"] == pytest.approx(other["starts"]["psnr"], rel=1e-3)


def test_two_processes_are_one_with_twice_the_batch(alone: Path, together: Path) -> None:
    assert_same_run(together / "replicated", alone)
    for process in found(together / "replicated"):
        assert process["backend"] == "onnxruntime"
        assert process["moved"] > 0.01
        assert process["off_policy"] < 1e-4 * process["moved"] + 1e-5
        assert process["sharded"] == 0


def test_two_processes_reward_faces_as_one_does(together: Path, tmp_path: Path) -> None:
    """Compare two processes with one process that computes the two samples one after the other.

    The face reward is not a continuous function of the frames, and the rounding of kernels depends on the batch size.
    The frames of a batch of two differ by 1e-6, so it is compared with a larger tolerance (see `RewardTape`).
    """
    pair = together / "faces"
    run(tmp_path / "accumulated", "faces", batch_size=1, accumulation=2)
    run(tmp_path / "batch", "faces", batch_size=2)
    for line in lines(pair):
        assert line["detection_rate"] > 0.5, "a sample had no reward that could be compared"
    assert error(first_gradient(pair), first_gradient(tmp_path / "accumulated")) <= 1e-5
    assert error(adapter(pair), adapter(tmp_path / "accumulated")) <= 1e-3
    first, batch = lines(pair)[0], lines(tmp_path / "batch")[0]
    assert first["sample_id"] == batch["sample_id"]
    assert first["face_score"] == pytest.approx(batch["face_score"], abs=5e-3)
    assert error(first_gradient(pair), first_gradient(tmp_path / "batch")) <= 5e-2


def test_fsdp2_shards_what_is_frozen_and_trains_the_same(alone: Path, together: Path) -> None:
    assert_same_run(together / "sharded", alone)
    processes = found(together / "sharded")
    assert [process["sharded_lora"] for process in processes] == [0, 0]
    # Ten linear layers in each of four blocks, weight and bias.
    assert [process["sharded"] for process in processes] == [80, 80]
