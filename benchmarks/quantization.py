"""Measure the effect of frozen weights in 8 or 4 bits on velocity, context, loss, gradient and training.

    python benchmarks/quantization.py

Errors are differences from the built-in model in bf16, with a nonzero LoRA, averaged over clips and timesteps. `fp32`
is the same model in full precision; it shows the error of bf16 itself. Then each contender except `fp32` trains a LoRA
with several seeds, and the scores of validation samples, generated from fixed noise, are compared before and after. A
quantization format trains like bf16 if its mean score after training differs from that of bf16 by at most the spread of
bf16: its largest minus its smallest score over the seeds. The sizes of the denoiser are those of models without data,
so no weights of the full-size model are needed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import flat_gradient
from measuring import RESULTS, machine, write_result
from rich.console import Console
from rich.table import Table
from shapes import spread_lora
from torch import Tensor

from frostline.config import LoraSettings, QuantizationSettings
from frostline.models.quantization.storage import FORMATS
from frostline.models.tiny.clips import held_out_clips, render_clips
from frostline.stages.families import family_of
from frostline.train import TrainingModule

BASE = "bf16"
CONTENDERS: Mapping[str, tuple[str, torch.dtype]] = {
    BASE: ("none", torch.bfloat16),
    "fp32": ("none", torch.float32),
    **{kind: (kind, torch.bfloat16) for kind in FORMATS},
}
# Sharpness is used because it is differentiable everywhere, and every clip has a score.
_REWARD = {"type": "sharpness", "baseline": 0, "scale": 1}
_TIMESTEPS = (200.0, 500.0, 900.0)


def main() -> None:
    """Measure, print tables and write JSON."""
    arguments = _arguments()
    errors = _errors(arguments)
    training = _training(arguments) if arguments.seeds else None
    result = {
        "arguments": {name: str(value) for name, value in vars(arguments).items() if name != "out"},
        "machine": machine(torch.device("cpu")),
        "error_against_bf16": errors,
        "training": training,
        "denoiser_bytes": {"tiny": _sizes("tiny"), arguments.release: _sizes(arguments.release)},
    }
    write_result(arguments.out, result)
    _print(result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4, help="number of clips that the error is averaged over")
    parser.add_argument("--seeds", type=int, default=3, help="number of training seeds; 0: no training")
    parser.add_argument("--steps", type=int, default=24, help="number of training steps")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--release", default="Wan2.2-I2V-A14B", help="release to compute the denoiser's size for")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantization.json")
    return parser.parse_args()


def _module(name: str, seed: int = 0, **settings: Any) -> TrainingModule:
    """Return a module whose denoiser and text encoder are stored as the contender `name` defines."""
    kind, dtype = CONTENDERS[name]
    torch.manual_seed(seed)
    return TrainingModule.from_pretrained(
        "tiny",
        engines=None,
        plan="torch",
        dtype=dtype,
        quantization=kind,  # type: ignore[arg-type]
        text_encoder_quantization=kind,  # type: ignore[arg-type]
        gradient_checkpointing="none",
        rewards=[_REWARD],
        lora={"rank": 8},
        **{"num_inference_steps": 4, "grad_start_step": 2, "grad_end_step": 3, "kl_weight": 0.01, **settings},
    )


def _errors(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    clips = held_out_clips(arguments.clips, seed=2, num_frames=5, size=32)
    found: dict[str, list[dict[str, Tensor]]] = {}
    for name in CONTENDERS:
        module = _module(name)
        spread_lora(module)
        found[name] = [
            _outcome(module, {"prompt": [clips.prompts[index]], "video": clips.video[index : index + 1]})
            for index in range(arguments.clips)
        ]
    return {name: _compare(found[name], found[BASE]) for name in CONTENDERS if name != BASE}


def _outcome(module: TrainingModule, data: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return context, velocities at all timesteps, loss, and the gradient of the LoRA, flat and in fp64."""
    module.zero_grad()
    conditioning = module.forward_preprocess(data)
    inputs = dict(module.model.denoiser_inputs(conditioning.conditions))
    noise = torch.randn(1, *conditioning.latent_shape, generator=torch.Generator().manual_seed(0))
    denoiser = module.model.experts[-1].module
    with torch.no_grad():
        velocities = [
            denoiser(latents=noise.to(module.model.dtype), timestep=torch.tensor([timestep]), **inputs)
            for timestep in _TIMESTEPS
        ]
    loss, _, _ = module(data, conditioning)
    loss.backward()
    context = inputs["context"]
    return {
        "context": context.double().flatten(),
        "velocity": torch.stack(velocities).double().flatten(),
        "loss": loss.detach().double(),
        "gradient": flat_gradient(module),
    }


def _compare(found: Sequence[Mapping[str, Tensor]], base: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return relative errors in the Euclidean norm, and the cosine of the gradients, as means over the clips."""

    def mean(values: Any) -> float:
        return statistics.fmean(float(value) for value in values)

    pairs = [*zip(found, base, strict=True)]
    cosine = torch.nn.functional.cosine_similarity
    return {
        **{
            f"{what}_relative_error": mean((one[what] - two[what]).norm() / two[what].norm() for one, two in pairs)
            for what in ("context", "velocity", "gradient")
        },
        "loss_difference": mean((one["loss"] - two["loss"]).abs() for one, two in pairs),
        "loss_of_bf16": mean(two["loss"] for _, two in pairs),
        "gradient_cosine": mean(cosine(one["gradient"], two["gradient"], dim=0) for one, two in pairs),
    }


def _training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train each contender except fp32 with each seed; return the scores of the validation samples before and after."""
    names = [name for name in CONTENDERS if name != "fp32"]
    runs = {name: [_run(name, seed, arguments) for seed in range(arguments.seeds)] for name in names}
    gains = {name: [run["after"] - run["before"] for run in of_name] for name, of_name in runs.items()}
    after = {name: [run["after"] for run in of_name] for name, of_name in runs.items()}
    mean = {name: statistics.fmean(values) for name, values in after.items()}
    spread = max(after[BASE]) - min(after[BASE])
    return {
        "runs": runs,
        "mean_gain": {name: statistics.fmean(values) for name, values in gains.items()},
        "mean_score": mean,
        "spread_of_bf16": spread,
        "as_bf16": {name: abs(mean[name] - mean[BASE]) <= spread for name in names if name != BASE},
    }


def _run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    module = _module(name, seed, noise_seed=None)
    clips = render_clips(8, torch.Generator().manual_seed(0), num_frames=5, size=32)
    optimizer = torch.optim.AdamW(module.trainable_parameters().values(), lr=arguments.learning_rate, weight_decay=0)
    order = torch.Generator().manual_seed(seed)
    before = _validate(module)
    for _ in range(arguments.steps):
        index = int(torch.randint(8, (), generator=order))
        loss, _, _ = module({"prompt": [clips.prompts[index]], "video": clips.video[index : index + 1]})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.trainable_parameters().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = _validate(module)
    print(f"{name}, seed {seed}: {before:.4f} to {after:.4f}", flush=True)
    return {"before": before, "after": after}


def _validate(module: TrainingModule) -> float:
    clips = held_out_clips(4, seed=2, num_frames=5, size=32)
    conditioning = module.forward_preprocess({"prompt": clips.prompts, "video": clips.video})
    noise = torch.randn(4, *conditioning.latent_shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ((_, scored),) = module.score(module.generate(conditioning, noise), conditioning)
    return scored.score.double().mean().item()


def _sizes(model: str) -> dict[str, int]:
    """Return the bytes of the denoiser's frozen weights in bf16 and in each quantized format."""
    family, sizes = family_of(model), {}
    spec = family.read_spec(model)
    for kind in ("none", *FORMATS):
        stored = QuantizationSettings.parse({"quantization": kind})
        empty = family.empty_model(spec, torch.bfloat16, LoraSettings(), stored)
        sizes[BASE if kind == "none" else kind] = sum(p.nbytes for p in empty.stage_parameters()["denoiser"])
    return sizes


def _print(result: Mapping[str, Any]) -> None:
    console = Console(width=140)
    table = Table("against bf16", title="error of the built-in model")
    columns = ("context", "velocity", "loss", "gradient", "1 - cosine of the gradient")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in result["error_against_bf16"].items():
        relative = [f"{row[f'{what}_relative_error']:.4f}" for what in ("context", "velocity")]
        figures = (*relative, f"{row['loss_difference']:.4f}", f"{row['gradient_relative_error']:.4f}")
        table.add_row(name, *figures, f"{1 - row['gradient_cosine']:.4f}")
    console.print(table)
    for model, sizes in result["denoiser_bytes"].items():
        console.print(f"{model}: " + ", ".join(f"{name} {size / 1e9:.4g} GB" for name, size in sizes.items()))
    training = result["training"]
    if training is None:
        return
    table = Table("", title="score of validation samples")
    for column in ("gain", "after", "trains like bf16"):
        table.add_column(column, justify="right")
    for name, gain in training["mean_gain"].items():
        table.add_row(
            name, f"{gain:.4f}", f"{training['mean_score'][name]:.4f}", str(training["as_bf16"].get(name, ""))
        )
    console.print(table)
    console.print(f"spread of bf16 over its seeds: {training['spread_of_bf16']:.4f}")


if __name__ == "__main__":
    main()
