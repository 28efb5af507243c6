"""Runs of each reward in two processes, one of them sharded, and their results; started by test_distributed.py.

The runs with the reward `sharpness` also recompute in backward; the runs that they are compared with do not.

python distributed_runs.py OUT ENGINES
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from killed_runs import SHARPNESS
from steps import Clips
from torch.distributed.tensor import DTensor

from frostline.stages.denoiser import REFERENCE
from frostline.train import WanTrainingModule
from frostline.train.loop.trainer import RunOptions, make_accelerator, train
from frostline.train.loop.validation import Validation, validate
from frostline.train.processes import process_index
from frostline.train.settings import TrainerSettings

FACES = {"type": "face_identity", "upscale": 2}
STEPS = {"sharpness": 5, "faces": 2}


def run(
    out: Path,
    reward: str,
    batch_size: int,
    accumulation: int = 1,
    engines: Path | None = None,
    sharded: bool = False,
    gradient_checkpointing: str = "none",
) -> WanTrainingModule:
    """Train with the same noise in every step, and without gradient clipping; return the module."""
    torch.manual_seed(0)
    module = WanTrainingModule.from_pretrained(
        "tiny",
        engines=engines,
        plan="torch",
        lora={"rank": 4},
        rewards=[SHARPNESS if reward == "sharpness" else FACES],
        num_inference_steps=3,
        grad_start_step=1,
        grad_end_step=2,
        gradient_checkpointing=gradient_checkpointing,
    )
    if engines is not None:
        module.runtime.replan({"*": "torch", "denoiser": "onnxruntime"})
    settings = TrainerSettings(
        learning_rate=1e-3,
        max_grad_norm=1e9,
        max_train_steps=STEPS[reward],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        checkpointing_steps=1,
    )
    clips = Clips() if reward == "sharpness" else Clips(size=64)
    starts = Validation(clips, [0, 1, 2])
    options = RunOptions(validate=lambda step: validate(module, starts, step, out), validation_steps=5)
    accelerator = make_accelerator(settings, out, cpu=True)
    if sharded:
        # accelerate enables FSDP only on GPUs, but its code also runs on a CPU.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    train(module, clips, settings, out, options, accelerator)
    return module


def main() -> None:
    out, engines = Path(sys.argv[1]), Path(sys.argv[2])
    run(out / "faces", "faces", 1)
    note(out / "replicated", run(out / "replicated", "sharpness", 1, engines=engines, gradient_checkpointing="full"))
    # Start again as with `accelerate launch --use_fsdp`.
    AcceleratorState._reset_state()
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    note(out / "sharded", run(out / "sharded", "sharpness", 1, sharded=True, gradient_checkpointing="full"))
    PartialState().destroy_process_group()


def note(out: Path, module: WanTrainingModule) -> None:
    """Write the backend of the denoiser, whether it is on-policy, and the number of sharded parameters."""
    stage = module.stages["denoiser"]
    inputs = stage.cases()["sample"].inputs
    with torch.no_grad():
        policy = stage.torch(inputs)["velocity"]
        base = stage.torch(inputs, REFERENCE)["velocity"]
    served = module.runtime["denoiser"](**inputs)["velocity"]
    found = {
        "backend": module.runtime.plan["denoiser"].backend,
        "off_policy": ((served - policy).norm() / policy.norm()).item(),
        "moved": ((policy - base).norm() / base.norm()).item(),
        "sharded": sum(isinstance(parameter, DTensor) for parameter in module.parameters()),
        "sharded_lora": sum(isinstance(parameter, DTensor) for parameter in module.trainable_parameters().values()),
    }
    (out / f"process-{process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
