"""What a setting of a run can act on, each as a function from the settings to something that can be compared."""

import functools
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from frostline.documents import read_yaml
from frostline.models.tiny.clips import held_out_clips, render_clips
from frostline.progress import Progress
from frostline.rewards.inputs import RewardInputs
from frostline.train import WanTrainingModule
from frostline.train.data.dataset import collate
from frostline.train.data.loader import Batches
from frostline.train.dry_run import print_dry_run
from frostline.train.launch import build_module, load_judges, open_validation, run_training
from frostline.train.settings import RunSettings

Observe = Callable[[RunSettings], Any]


def a_step(settings: RunSettings) -> Any:
    """Return loss, score, KL, gradients, and what was saved, recomputed and cached, of one forward and backward."""
    module = build_module(settings, torch.device("cpu"))
    with torch.no_grad():
        for index, parameter in enumerate(module.trainable_parameters().values()):
            parameter.copy_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    blocks = 0

    def count(*_: object) -> None:
        nonlocal blocks
        blocks += 1

    module.components.denoiser.blocks[0].ffn.register_forward_hook(count)
    served = Counter()
    run = module.runtime.run

    def serve(stage: str, *arguments: Any, **options: Any) -> Any:
        served[stage] += 1
        return run(stage, *arguments, **options)

    module.runtime.run = serve
    torch.manual_seed(1)
    assert settings.data.source is not None
    loss, score, kl_loss = module(collate([settings.data.open()[0]]))
    loss.backward()
    assert module.last_metrics is not None
    cache = settings.cache_dir or settings.output_dir / "cache"
    return {
        "loss": (loss.item(), score.item(), kl_loss.item(), module.last_metrics.per_sample),
        "gradients": {name: _numbers(p.grad) for name, p in module.trainable_parameters().items()},
        "scale": module.stages["denoiser"].networks[0].samples("opt")["lora_scale"].item(),
        "blocks": blocks,
        "served": served,
        "saving": type(module._saved_tensors()).__name__,
        "cache": (module.parts.cache is None, settings.cache_dir is not None and cache.is_dir()),
        "variant": [type(rewarded.reward).__name__ for rewarded in module.rewards],
    }


def compiled(settings: RunSettings) -> Any:
    """Return whether a step passes graphs to the compiler; other tests check the compiled blocks."""
    graphs = []

    def compile_nothing(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=compile_nothing))
        return a_step(settings)["blocks"] > 0, len(graphs) > 0


def a_start(settings: RunSettings) -> Any:
    """Return the state of the module before the first step: sizes, LoRA, dtypes, the plan, and the shapes of stages."""
    module = build_module(settings, torch.device("cpu"))
    sizes = {
        network.name: [(spec.name, [str(extent) for extent in spec.shape]) for spec in network.inputs]
        for stage in module.stages.values()
        for network in stage.networks
    }
    return {
        "variant": (module.components.pins_first_frame, module.components.denoiser_high_noise is None),
        "lora": {name: (p.shape, p.dtype, _numbers(p)) for name, p in module.trainable_parameters().items()},
        "dtype": module.components.denoiser.patch_embedding.weight.dtype,
        "plan": {name: (choice.backend, choice.reason) for name, choice in module.runtime.plan.items()},
        "sizes": sizes,
    }


def faces(settings: RunSettings) -> Any:
    """Return the face scores of a clip whose face disappears halfway, and the loss of a clip without a face."""
    module = build_module(settings, torch.device("cpu"))
    video = held_out_clips(1, seed=3, num_frames=5).video
    gone = video.clone()
    gone[:, 3:] = 0.5
    (active,) = module.rewards
    sample = RewardInputs(("p",), video, (5,))
    score = active.score(gone, sample, active.references(sample, module.runtime), module.runtime)
    with torch.no_grad():
        loss = module({"prompt": ["p"], "video": torch.full((1, 5, 3, 32, 32), 0.5)})[0]
    return score.score.tolist(), {name: m.tolist() for name, m in score.metrics.items()}, loss.item()


def two_faces(settings: RunSettings) -> Any:
    """Return the face scores, in validation and in training, of frames with the person and a larger other person."""
    module = build_module(settings, torch.device("cpu"))
    people = torch.tensor([0, 1])
    clips = render_clips(2, torch.Generator().manual_seed(0), num_frames=5, person=people).video
    both = torch.full((1, 5, 3, 96, 192), 0.5)
    both[..., 96:] = clips[1]
    both[..., 24:72, 24:72] = torch.nn.functional.avg_pool2d(clips[0], 2)
    conditioning = module.forward_preprocess({"prompt": ["p"], "video": clips[:1]})
    with torch.no_grad():
        ((_, validated),) = module.score(both, conditioning)
    ((_, trained),) = module.score(both.clone().requires_grad_(), conditioning)
    return validated.score.tolist(), trained.score.tolist(), trained.valid.tolist()


def samples(section: str) -> Observe:
    """Return a function that returns the rows of a data source, and its first sample."""

    def observe(settings: RunSettings) -> Any:
        videos = getattr(settings, section)
        dataset = videos.open()
        sample = dataset[0]
        bad = [row.field for row in dataset.validate()]
        return dataset.sample_ids, bad, tuple(sample["video"].shape), _numbers(sample["video"])

    return observe


def held_out(settings: RunSettings) -> Any:
    """Return the validation samples, their batch size and the seed of their noise."""
    validation = open_validation(settings)
    return None if validation is None else (list(validation.starts), validation.batch_size, validation.noise_seed)


def judging(settings: RunSettings) -> Any:
    """Return the judges of the validation samples."""
    module = build_module(settings, torch.device("cpu"))
    return [(judge.name, type(judge.active.reward).__name__) for judge in load_judges(settings, module)]


def a_run(settings: RunSettings) -> Any:
    """Return everything that a run writes, except times."""
    run_training(settings, None, Progress(quiet=True))
    out, left = settings.output_dir, {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and "cache" not in path.parts):
        name = path.relative_to(out).as_posix()
        left[name] = None
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            left[name] = [
                {k: v for k, v in line.items() if k not in ("seconds", "stages", "peak_memory_gb")} for line in lines
            ]
        elif path.suffix == ".safetensors":
            left[name] = {key: _numbers(tensor) for key, tensor in load_file(path).items()}
    left.update(dict.fromkeys(("trackers",), (out / "trackers").exists()))
    return left


def precomputed(settings: RunSettings) -> Any:
    """Return the number of cache entries before the first step."""
    there = []
    forward = WanTrainingModule.forward

    def counted(module: WanTrainingModule, data: Any) -> Any:
        there.append(len([*settings.frozen_cache_dir.glob("*.safetensors")]))
        return forward(module, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanTrainingModule, "forward", counted)
        a_run(settings)
    return there[0]


def precomputes(settings: RunSettings) -> Any:
    """Return the setting `precompute` in the configuration file that a run writes into its folder."""
    a_run(settings)
    return RunSettings.parse(read_yaml(settings.output_dir / "config.yaml")).precompute


def folders(settings: RunSettings) -> Any:
    """Return the folders to which a run writes."""
    a_run(settings)
    return sorted(path.parent.name for path in Path().glob("*/metrics.jsonl"))


def twice(settings: RunSettings) -> Any:
    """Run twice in the same folder."""
    a_run(settings)
    return a_run(settings)


def workers(settings: RunSettings) -> Any:
    """Return the number of processes that a run uses to read its data."""
    wanted = []

    class Counted(Batches):
        def __init__(self, dataset: Any, order: Any, num_workers: int) -> None:
            wanted.append(num_workers)
            super().__init__(dataset, order, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("frostline.train.loop.trainer.Batches", Counted)
        a_run(settings)
    return wanted


def never_finite(settings: RunSettings) -> Any:
    """Return what a run with a loss that is never finite writes."""
    forward = WanTrainingModule.forward

    def poisoned(module: WanTrainingModule, data: Any) -> Any:
        loss, *others = forward(module, data)
        return loss * float("nan"), *others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanTrainingModule, "forward", poisoned)
        return a_run(settings)


def the_dry_run(settings: RunSettings) -> Any:
    """Return the page that `--dry-run` prints."""
    page = io.StringIO()
    print_dry_run(settings, Console(file=page, width=160))
    return page.getvalue()


def _numbers(tensor: torch.Tensor | None) -> Any:
    return (
        None if tensor is None else (tuple(tensor.shape), tensor.double().sum().item(), tensor.double().norm().item())
    )
