"""A whole training step: the reference's way, eager, torch.compile, frostline cold and warm, and the floor.

    python benchmarks/step.py --model tiny --out benchmarks/results/step-tiny.json
    python benchmarks/step.py --model wan2.1-1.3b --device cuda --precision bf16 --video 1x17x3x256x256

- reference: nothing recalled, faces searched a frame at a time by facenet-pytorch's own MTCNN, every block recomputed.
- eager: frostline's step, all in PyTorch, nothing recalled.
- compile: the same with torch.compile on the denoiser's blocks and the face embedder.
- cold: frostline with the engines that its plan chooses, nothing recalled: a sample's first epoch.
- warm: the same with frozen outputs recalled: every later epoch.
- floor: every frozen result for free; what is left is the live part, which no engine can take over.

All contenders start from equal weights and noise; their losses and gradients are compared before their times are.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, interleave, machine, peak_gpu_gib, ratio, summary, write_result
from rich.console import Console
from rich.table import Table
from shapes import DTYPES, TINY, WAN_1_3B, build_components
from torch import Tensor

import frostline.models.denoiser as denoiser_file
from frostline.config import TrainingModuleSettings
from frostline.errors import EngineError, FrostlineError
from frostline.export.exporter import export_stage
from frostline.export.shapes import parse_shapes
from frostline.models.tiny.clips import held_out_clips
from frostline.runtime.backends import TORCH
from frostline.runtime.store import EngineStore
from frostline.train.module import WanTrainingModule

CONTENDERS = ("reference", "eager", "compile", "cold", "warm", "floor")
# Ratios by name: which contender's time over which.
RATIOS = {
    "reference_over_warm": ("reference", "warm"),
    "reference_over_cold": ("reference", "cold"),
    "eager_over_warm": ("eager", "warm"),
    "eager_over_cold": ("eager", "cold"),
    "compile_over_warm": ("compile", "warm"),
    "compile_over_cold": ("compile", "cold"),
    "warm_over_floor": ("warm", "floor"),
    "cold_over_floor": ("cold", "floor"),
}
# A difference of one unit in the last place, at the noise, moves loss and gradient about so much.
_SAME = {"fp32": (1e-3, 0.999), "bf16": (5e-2, 0.9), "fp16": (2e-2, 0.95)}


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    module = _build(arguments, device)
    batch = _batch(arguments.video, device)
    result: dict[str, Any] = {"arguments": vars(arguments) | {"out": str(arguments.out)}, "machine": machine(device)}
    with tempfile.TemporaryDirectory() as folder:
        result["engines"] = _export(module, arguments, arguments.engines_dir or Path(folder))
        module.runtime.replan("auto")
        result["plan"] = {name: vars(choice) for name, choice in module.runtime.plan.items()}
        Console().print(str(module.runtime.plan), highlight=False)
        write_result(arguments.out, result)
        game = Game(module, batch)
        names = [name for name in CONTENDERS if name not in arguments.without.split(",")]
        result["checks"] = checks = _check(game, names, *_SAME[arguments.precision])
        write_result(arguments.out, result)
        stages: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        steps = {name: _step(game, name, stages[name]) for name in names}
        samples = interleave(steps, arguments.rounds, device)
        result["contenders"] = {
            name: {**row, "samples_ms": samples[name], "stages_ms": _medians(stages[name][1:])}
            for name, row in summary(samples).items()
        }
        for name, step in steps.items():
            result["contenders"][name]["peak_gpu_gib"] = peak_gpu_gib(step, device)
    pairs = {name: pair for name, pair in RATIOS.items() if set(pair) <= set(names)}
    result["ratio_spread"] = {name: ratio(samples, *pair) for name, pair in pairs.items()}
    result["ratios"] = {name: spread["median"] for name, spread in result["ratio_spread"].items()}
    write_result(arguments.out, result)
    _print(result)
    if strange := [name for name, check in checks.items() if not check["same"]]:
        raise SystemExit(
            f"{', '.join(strange)}: not the same loss or gradient as eager, so these times compare nothing"
        )


class Game:
    """One module that plays each contender in turn, on one batch."""

    def __init__(self, module: WanTrainingModule, batch: Mapping[str, Any]) -> None:
        self.module = module
        self.batch = batch
        self._cache = module.conditioner.cache
        self._block = denoiser_file._block
        self._compiled_block = torch.compile(denoiser_file._block)
        self._compiled_embedder = torch.compile(module.embedder)
        self._per_frame = _per_frame_detector(module)
        with torch.no_grad():
            self._conditioning = module.forward_preprocess(batch)
        self._frozen: list[dict[str, Tensor]] = []

    @contextmanager
    def playing(self, contender: str) -> Iterator[None]:
        """Within the block the module steps as `contender` does."""
        module = self.module
        in_torch = contender in ("reference", "eager", "compile")
        module.conditioner.cache = self._cache if contender in ("warm", "floor") else None
        with contextlib.ExitStack() as stack:
            if in_torch:
                stack.enter_context(module.runtime.use(**dict.fromkeys(module.stages, TORCH)))
            if contender == "reference":
                stack.enter_context(_replaced(module.denoiser, "gradient_checkpointing", "block"))
                stage = module.runtime.stages["face_detector"]
                stage = replace(stage, torch=self._per_frame)
                stack.enter_context(_replaced(module.runtime, "stages", {**module.runtime.stages, stage.name: stage}))
            if contender == "compile":
                stack.enter_context(_replaced(denoiser_file, "_block", self._compiled_block))
                stack.enter_context(_replaced(module.rewards[0].reward.identity, "embedder", self._compiled_embedder))
            if contender == "floor":
                stack.enter_context(_replaced(module.runtime, "run", self._replay()))
            yield
        module.conditioner.cache = self._cache

    def forward(self, contender: str) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, face score, KL loss."""
        return self.module(self.batch, self._conditioning if contender == "floor" else None)

    def record_frozen(self) -> None:
        """Keep what every frozen stage answers in one step, to be given for free."""
        run = self.module.runtime.run
        self._frozen = []

        def recording(stage: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            outputs = run(stage, inputs)
            self._frozen.append(outputs)
            return outputs

        with _replaced(self.module.runtime, "run", recording):
            self.module(self.batch, self._conditioning)

    def _replay(self) -> Callable[[str, Mapping[str, Tensor]], dict[str, Tensor]]:
        answers = iter(self._frozen)
        return lambda stage, inputs: next(answers)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    own = name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _per_frame_detector(module: WanTrainingModule) -> Callable[..., dict[str, Tensor]]:
    """facenet-pytorch's own detection, frame after frame, in the form of the stage's outputs."""
    from facenet_pytorch import MTCNN

    device = module.components.denoiser.patch_embedding.weight.device
    mtcnn = MTCNN(keep_all=True, min_face_size=module.settings.reward.min_face_size, device=device)

    def detect(frames: Tensor) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {"boxes": [], "probabilities": [], "landmarks": [], "frame_index": []}
        for index, frame in enumerate(frames.permute(0, 2, 3, 1)):
            boxes, probabilities, landmarks = mtcnn.detect(frame.cpu().numpy(), landmarks=True)  # type: ignore[misc]
            if boxes is None:
                continue
            rows["boxes"].append(torch.as_tensor(boxes.astype("float32")).reshape(-1, 4))
            rows["probabilities"].append(torch.as_tensor(probabilities.astype("float32")))
            rows["landmarks"].append(torch.as_tensor(landmarks.astype("float32")).reshape(-1, 5, 2))
            rows["frame_index"].append(torch.full((len(boxes),), index))
        empty = {"boxes": (0, 4), "probabilities": (0,), "landmarks": (0, 5, 2), "frame_index": (0,)}
        return {
            name: (torch.cat(parts) if parts else torch.zeros(empty[name])).to(
                device, torch.int64 if name == "frame_index" else torch.float32
            )
            for name, parts in rows.items()
        }

    return detect


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "--shape", choices=(TINY, WAN_1_3B), default=TINY)
    parser.add_argument("--backends", default="onnxruntime,aotinductor")
    parser.add_argument("--stages", help="export these only, comma-separated; all if not given")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--video", default="2x9x3x96x96", help="BxTx3xHxW")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gradient-checkpointing", choices=("none", "block", "full"), default="none")
    parser.add_argument("--without", default="", help="contenders to leave out, comma-separated")
    parser.add_argument("--engines-dir", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json")
    return parser.parse_args()


def _build(arguments: argparse.Namespace, device: torch.device) -> WanTrainingModule:
    settings = TrainingModuleSettings.parse(
        {
            "lora": {"rank": arguments.rank},
            "kl_weight": 0.2,
            "gradient_checkpointing": arguments.gradient_checkpointing,
            "reward": {"upscale": 2 if arguments.model == TINY else 1},
        }
    )
    components = build_components(arguments.model, DTYPES[arguments.precision], device)
    shapes = parse_shapes("", f"video:{arguments.video}", "")
    module = WanTrainingModule(components, settings, plan=TORCH, engines=arguments.engines_dir, shapes=shapes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # A policy of its own: with the B matrices at zero there is no KL term and half of the gradient.
        for parameter in module.trainable_parameters().values():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def _batch(video: str, device: torch.device) -> dict[str, Any]:
    count, frames, _, height, width = (int(part) for part in video.split("x"))
    clips = held_out_clips(count, seed=0, num_frames=frames, size=max(height, width))
    return {"prompt": clips.prompts, "video": clips.video[..., :height, :width].contiguous()}


def _export(module: WanTrainingModule, arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, str]]:
    """Engines of all frozen stages; what cannot be built is told and left to torch."""
    module.runtime._store = store = EngineStore(folder)
    outcome: dict[str, dict[str, str]] = {}
    wanted = arguments.stages.split(",") if arguments.stages else list(module.stages)
    for name, stage in ((name, module.stages[name]) for name in wanted if name in module.stages):
        for backend in filter(None, arguments.backends.split(",")):
            start = time.monotonic()
            try:
                exported = export_stage(stage, backend, store)
                said = exported.unverified or f"verified, {exported.manifest.latency_ms}"
            except (EngineError, FrostlineError) as error:
                said = str(error)[:300]
            said = f"{time.monotonic() - start:.0f} s: {said}"
            outcome.setdefault(name, {})[backend] = said
            Console(stderr=True).print(f"{name} {backend}: {said}", highlight=False)
    return outcome


def _check(game: Game, names: list[str], loss_tolerance: float, least_cosine: float) -> dict[str, Any]:
    """Loss and gradient of every contender against eager's."""
    game.record_frozen()
    outcomes = {}
    for name in names:
        with game.playing(name):
            loss, face_score, kl_loss = game.forward(name)
            loss.backward()
        gradient = torch.cat(
            [p.grad.flatten() for p in game.module.trainable_parameters().values() if p.grad is not None]
        )
        outcomes[name] = (loss.item(), face_score.item(), kl_loss.item(), gradient.double())
        game.module.zero_grad()
    _, _, _, wanted = outcomes["eager"]
    checks = {}
    for name, (loss, face_score, kl_loss, gradient) in outcomes.items():
        cosine = torch.nn.functional.cosine_similarity(gradient, wanted, dim=0).item()
        norm = (gradient.norm() / wanted.norm()).item()
        same = abs(loss - outcomes["eager"][0]) <= loss_tolerance and cosine >= least_cosine
        checks[name] = {
            "loss": loss,
            "face_score": face_score,
            "kl_loss": kl_loss,
            "gradient_cosine": cosine,
            "gradient_norm_ratio": norm,
            "same": same,
        }
    return checks


def _step(game: Game, name: str, stages: list[dict[str, float]]) -> Callable[[], None]:
    def step() -> None:
        module = game.module
        with game.playing(name):
            loss, _, _ = game.forward(name)
            with module.runtime.clock.measure("backward", TORCH):
                loss.backward()
        module.zero_grad()
        assert module.last_metrics is not None
        spans = {**module.last_metrics.stages, **module.runtime.clock.read()}
        stages.append({stage: span.milliseconds for stage, span in spans.items()})

    return step


def _medians(samples: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for sample in samples for name in sample})
    return {name: sorted(sample.get(name, 0.0) for sample in samples)[len(samples) // 2] for name in names}


def _print(result: Mapping[str, Any]) -> None:
    table = Table("contender", title="one training step")
    stages = sorted({stage for row in result["contenders"].values() for stage in row["stages_ms"]})
    for column in ("ms", *stages, "peak GPU GiB"):
        table.add_column(column, justify="right")
    for name, row in result["contenders"].items():
        peak = row["peak_gpu_gib"]
        cells = [f"{row['stages_ms'].get(stage, 0):.0f}" for stage in stages]
        table.add_row(name, f"{row['median_ms']:.0f}", *cells, "-" if peak is None else f"{peak:.1f}")
    console = Console(width=200)
    console.print(table)
    for name, spread in result["ratio_spread"].items():
        console.print(f"{name}: {spread['median']:.2f} ({spread['quartile_1']:.2f} to {spread['quartile_3']:.2f})")


if __name__ == "__main__":
    main()
