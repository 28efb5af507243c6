"""The training loop: accelerate for device and distribution, AdamW, clipping, metrics.jsonl, the adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from frostline.config import Settings
from frostline.runtime.clock import StageTime
from frostline.train.data import CollatedBatch, Sample, collate
from frostline.train.module import WanTrainingModule


class TrainerSettings(Settings):
    """How long and how fast to train."""

    learning_rate: float = Field(default=2.5e-6, gt=0, description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    max_train_steps: int = Field(default=100, ge=1, description="optimizer steps")
    per_device_train_batch_size: int = Field(default=1, ge=1, description="samples per step and process")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    seed: int = Field(default=0, ge=0, description="of data order and fresh noise")


def train(
    module: WanTrainingModule,
    dataset: Dataset[Sample],
    settings: TrainerSettings,
    output_dir: Path,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> None:
    """Train the LoRA of `module`; writes `metrics.jsonl` as it goes and `adapter/` at the end.

    Args:
        on_step: receives each line of `metrics.jsonl`.
    """
    accelerator = Accelerator(cpu=module.components.denoiser.patch_embedding.weight.device.type == "cpu")
    set_seed(settings.seed)
    parameters = list(module.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    loader = DataLoader(
        dataset,
        batch_size=settings.per_device_train_batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    model, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "metrics.jsonl").open("w") as log:
        for step, batch in zip(range(1, settings.max_train_steps + 1), _forever(loader), strict=False):
            start = time.perf_counter()
            loss, face_score, kl_loss = model(batch)
            with module.runtime.clock.measure("backward", "torch"):
                accelerator.backward(loss)
            grad_norm = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            backward = module.runtime.clock.read()
            metrics = {
                "step": step,
                "loss": loss.item(),
                "face_score": face_score.item(),
                "kl_loss": kl_loss.item(),
                "grad_norm": float(grad_norm) if grad_norm is not None else None,
                "learning_rate": settings.learning_rate,
                "seconds": seconds,
                **_sample_metrics(module, backward),
            }
            if accelerator.is_main_process:
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                on_step(metrics)
    if accelerator.is_main_process:
        module.save_adapter(output_dir / "adapter")


def _forever(loader: DataLoader[Sample]) -> Iterator[CollatedBatch]:
    while True:
        yield from loader  # type: ignore[misc]


def _sample_metrics(module: WanTrainingModule, backward: dict[str, StageTime]) -> dict[str, Any]:
    measured = module.last_metrics
    assert measured is not None
    count = len(measured.sample_id)
    stages = {**measured.stages, **backward}
    return {
        "detection_rate": sum(measured.detection_rate) / count,
        "face_score_missing_zero": sum(measured.face_score_missing_zero) / count,
        "sample_id": list(measured.sample_id),
        "kl": measured.kl,
        "stages": {name: {"backend": time.backend, "ms": time.milliseconds} for name, time in stages.items()},
    }
