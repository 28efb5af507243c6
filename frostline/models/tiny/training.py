"""Run a seeded, resumable training phase of the tiny models."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

_CHECKPOINT_EVERY = 100


@dataclass(frozen=True)
class Phase:
    """The settings of a training phase.

    Attributes:
        name: the name of the phase and its checkpoint.
        model: the module whose state is saved.
        parameters: the trained parameters of `model`.
        steps: the number of optimizer steps.
        learning_rate: the peak learning rate.
        warmup: the number of warm-up steps.
    """

    name: str
    model: nn.Module
    parameters: list[nn.Parameter]
    steps: int
    learning_rate: float
    warmup: int

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate: linear warm-up, then a cosine decay to 3 % of the peak."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (0.03 + 0.97 * cosine)


def autocast() -> torch.autocast:
    """Return bf16 autocast if the CPU supports avx512_bf16, where bf16 convolutions are three times as fast as fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def psnr(video: Tensor, truth: Tensor) -> float:
    """Return the peak signal-to-noise ratio of videos in [0, 1], in dB."""
    return (-10 * torch.log10((video - truth).pow(2).mean())).item()


def run_phase(
    phase: Phase,
    loss_at: Callable[[int, torch.Generator], Tensor],
    evaluate: Callable[[], Mapping[str, float]],
    work: Path,
) -> None:
    """Run `phase`, resuming from its last checkpoint in `work`; finished phases only load their result.

    Args:
        phase: the settings of the phase.
        loss_at: returns the scalar loss of a step. Its generator is seeded with the step, so that a resumed run uses
            the same batches as an uninterrupted one.
        evaluate: returns metrics, which are printed at each checkpoint.
        work: the folder of checkpoints.
    """
    checkpoint = work / f"{phase.name}.pt"
    optimizer = torch.optim.AdamW(phase.parameters, phase.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    start = _resume(checkpoint, phase.model, optimizer)
    losses: list[float] = []
    progress = tqdm(range(start, phase.steps), initial=start, total=phase.steps, desc=phase.name)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate_at(step)
        loss = loss_at(step, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(phase.parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
        done = step + 1
        if done % _CHECKPOINT_EVERY == 0 or done == phase.steps:
            state = {"model": phase.model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)
            mean = sum(losses) / len(losses)
            tqdm.write(json.dumps({"phase": phase.name, "step": done, "mean_loss": mean, **evaluate()}))
            losses.clear()


def _resume(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
