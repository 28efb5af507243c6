"""Every setting of a run has an effect: each is changed alone, and its observed result must change.

Other tests check that the effect is right.
"""

import contextlib
import copy
import csv
import functools
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import make_adapter
from raft_file import raft_file
from rich.console import Console
from safetensors.torch import load_file
from vision_files import write_aesthetic, write_clip, write_dinov2

from frostline.config import dotted_names
from frostline.documents import read_yaml
from frostline.errors import FrostlineError
from frostline.models.checkpoints.loading import load_components
from frostline.models.tiny.clips import held_out_clips, render_clips
from frostline.progress import Progress
from frostline.rewards.inputs import RewardInputs
from frostline.train import WanTrainingModule
from frostline.train.data.dataset import collate
from frostline.train.data.loader import Batches
from frostline.train.dry_run import print_dry_run
from frostline.train.launch import build_module, load_judges, open_validation, run_training
from frostline.train.settings import RunSettings
from frostline.video import write_video

# Fields of other rewards than the default one.
OF_OTHER_REWARDS = tuple(f"rewards.0.{name}" for name in ("floor", "flow", "updates", "size", "options"))
OF_ONES_OWN = "frostline.rewards.sharpness:SharpnessReward"
BASE: dict[str, Any] = {
    "model": "tiny",
    "device": "cpu",
    "output_dir": "run",
    "num_inference_steps": 3,
    "grad_start_step": 1,
    "grad_end_step": 2,
    "lora": {"rank": 2},
    "plan": {"backend": "torch", "engines": "engines"},
    "rewards": [{"type": "sharpness", "baseline": 0, "scale": 1}],
    "data": {"source": "data", "num_frames": 5},
    "validation": {"source": "data", "num_frames": 5, "steps": 2, "num_videos": 1},
    "train": {"learning_rate": 1e-3, "max_train_steps": 2, "checkpointing_steps": 1},
}
FACES = {"rewards": [{"type": "face_identity", "baseline": 0.54, "scale": 0.16}]}
MOTION = {"rewards": [{"type": "motion"}]}
RAFT = {"rewards": [{"type": "motion", "flow": "raft", "weights": "raft.pth", "updates": 1}]}
NO_VALIDATION = {"validation": {"source": None}}
HACKING = {
    "kl_weight": 0.0,
    "rewards": [{"type": "own_rewards:Brightness", "weight": 1.0}],
    "validation": {"steps": 1, "judges": [{"type": "sharpness"}]},
    "train": {"learning_rate": 3e-2},
}
SHARDED = {"memory": {"num_processes": 2, "sharding": "fsdp"}}
SMALL_DEVICE = {
    **NO_VALIDATION,
    "train": {"per_device_train_batch_size": 2},
    "precompute": "never",
    "memory": {"device_gb": 0.024},
}
Observe = Callable[[RunSettings], Any]


# Functions that return what settings affect.


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
    """Return whether a run precomputes, from the configuration file in its folder."""
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


@dataclass(frozen=True)
class Case:
    """A test of one setting.

    Attributes:
        value: the changed value.
        acts_on: returns what the setting affects.
        start: the other settings that differ from `BASE`.
        refused: a part of the error message, if the value is refused.
    """

    value: Any
    acts_on: Observe
    start: dict[str, Any] | None = None
    refused: str = ""


_data, _validation = samples("data"), samples("validation")
CASES: dict[str, Case] = {
    "num_inference_steps": Case(4, a_step),
    "grad_start_step": Case(2, a_step),
    "grad_end_step": Case(1, a_step),
    "shift": Case(3.0, a_step),
    "boundary": Case(0.99, a_step, {"model": "tiny-moe"}),
    "noise_seed": Case(25, a_step),
    "kl_weight": Case(0.5, a_step),
    "kl_target": Case(1e-3, a_run, NO_VALIDATION),
    "sft_weight": Case(0.5, a_step),
    "backprop.strategy": Case("last", a_step),
    "backprop.num_steps": Case(2, a_step, {"backprop": {"strategy": "random", "num_steps": 1}}),
    "backprop.steps": Case([2], a_step, {"backprop": {"strategy": "steps", "steps": [1, 2]}}),
    "backprop.stop_latent_gradient": Case(True, a_step),
    "backprop.lv_samples": Case(1, a_step, {"backprop": {"strategy": "last"}}),
    "backprop.kl_steps": Case("random:1", a_step),
    "decode.num_latent_frames": Case(1, a_step),
    "decode.position": Case("last", a_step, {"decode": {"num_latent_frames": 1, "position": "first"}}),
    "rollout.policy": Case("base", a_step),
    "gradient_checkpointing": Case("block", a_step),
    "engine_forward": Case(False, a_step, {"gradient_checkpointing": "full"}),
    "torch_compile": Case(True, compiled),
    "offload_saved_tensors": Case(True, a_step),
    "lora.rank": Case(3, a_start),
    "lora.alpha": Case(4.0, a_step),
    "lora.target_modules": Case(["q"], a_start),
    "lora.experts": Case("both", a_start, {"model": "tiny-moe"}),
    "rewards": Case([*BASE["rewards"], {"type": "face_identity"}], a_step),
    "rewards.0.type": Case("face_identity", a_step),
    "rewards.0.baseline": Case(0.1, a_step),
    "rewards.0.scale": Case(0.5, a_step),
    "rewards.0.weight": Case(0.3, a_step),
    "rewards.0.cap": Case(-100.0, a_step),
    "rewards.0.frames": Case("first", a_step),
    "rewards.0.floor": Case(0.1, a_step),
    "rewards.0.flow": Case("raft", a_step, MOTION, refused="flow: raft needs weights"),
    "rewards.0.updates": Case(2, a_step, RAFT),
    "rewards.0.size": Case(136, a_step, RAFT),
    "rewards.0.options": Case({"floor": 0.1}, a_step, {"rewards": [{"type": OF_ONES_OWN}]}),
    "rewards.0.detector": Case("yunet", faces, FACES),
    "rewards.0.embedder": Case("facenet:gone.pt", faces, FACES, refused="gone.pt"),
    "rewards.0.channels": Case("bgr", faces, FACES, refused="bgr needs arcface:PATH.onnx"),
    "rewards.0.upscale": Case(2, faces, FACES),
    "rewards.0.detection_size": Case(200, faces, FACES),
    "rewards.0.min_face_size": Case(90, faces, FACES),
    "rewards.0.face": Case("best", two_faces, FACES),
    "rewards.0.missing_face": Case("zero", faces, FACES),
    "rewards.0.on_unscored": Case("zero", faces, FACES),
    "cache_dir": Case("elsewhere", a_step),
    "cache_bytes": Case(0, a_step),
    "model": Case("tiny-ti2v", a_start),
    "base_adapters": Case([{"path": "lora"}], a_step),
    "quantization": Case("int8", a_step),
    "text_encoder_quantization": Case("fp8", a_step),
    "init_adapter": Case("lora", a_run, NO_VALIDATION),
    "precompute": Case("always", precomputed, NO_VALIDATION),
    "output_dir": Case("elsewhere", folders, NO_VALIDATION),
    "overwrite_output_dir": Case(True, twice, NO_VALIDATION),
    "device": Case("cuda", a_run, refused="torch finds no GPU"),
    "data.source": Case("other", _data),
    "data.num_frames": Case(9, _data),
    "data.height": Case(16, _data, {"data": {"width": 16}}),
    "data.width": Case(16, _data, {"data": {"height": 16}}),
    "data.max_pixels": Case(16 * 16, _data),
    "data.frame_stride": Case(2, _data),
    "data.allow_outside": Case(True, _data, {"data": {"source": "reaching"}}),
    "data.num_workers": Case(1, workers, NO_VALIDATION),
    "data.bad_rows": Case("skip", a_run, {**NO_VALIDATION, "data": {"source": "half"}}),
    "validation.source": Case(None, held_out),
    "validation.num_frames": Case(9, _validation),
    "validation.height": Case(16, _validation, {"validation": {"width": 16}}),
    "validation.width": Case(16, _validation, {"validation": {"height": 16}}),
    "validation.max_pixels": Case(16 * 16, _validation),
    "validation.frame_stride": Case(2, _validation),
    "validation.allow_outside": Case(True, _validation, {"validation": {"source": "reaching"}}),
    "validation.steps": Case(1, a_run),
    "validation.num_videos": Case(2, held_out),
    "validation.batch_size": Case(2, held_out),
    "validation.noise_seed": Case(1, held_out),
    "validation.lossless": Case(True, a_run),
    "validation.judges": Case([{"type": "sharpness"}], judging),
    "train.learning_rate": Case(2e-3, a_run, NO_VALIDATION),
    "train.weight_decay": Case(0.5, a_run, NO_VALIDATION),
    "train.adam_beta1": Case(0.5, a_run, NO_VALIDATION),
    "train.adam_beta2": Case(0.5, a_run, NO_VALIDATION),
    "train.adam_epsilon": Case(1e-2, a_run, NO_VALIDATION),
    "train.lr_scheduler_type": Case("linear", a_run, NO_VALIDATION),
    "train.lr_warmup_steps": Case(1, a_run, NO_VALIDATION),
    "train.max_train_steps": Case(1, a_run, NO_VALIDATION),
    "train.per_device_train_batch_size": Case(2, a_run, NO_VALIDATION),
    "train.gradient_accumulation_steps": Case(2, a_run, NO_VALIDATION),
    "train.max_grad_norm": Case(1e-6, a_run, NO_VALIDATION),
    "train.mixed_precision": Case("bf16", a_start),
    "train.seed": Case(1, a_start),
    "train.max_skipped_steps": Case(1, never_finite, NO_VALIDATION, refused="1 consecutive steps"),
    "train.checkpointing_steps": Case(2, a_run, NO_VALIDATION),
    "train.save_total_limit": Case(1, a_run, NO_VALIDATION),
    "train.ema_decay": Case(0.5, a_run, NO_VALIDATION),
    "train.stop_when_judge_falls": Case(1, a_run, HACKING),
    "train.report_to": Case("tensorboard", a_run, NO_VALIDATION),
    "plan.backend": Case("onnxruntime", a_start),
    "plan.stages": Case({"denoiser": "onnxruntime"}, a_start),
    "plan.engines": Case("built", a_start, {"plan": {"backend": "onnxruntime"}}),
    "plan.strict": Case(True, a_start, {"plan": {"backend": "openvino"}}, refused="no engine of"),
    "plan.min_shapes": Case("video:1x5x3x32x32", a_start),
    "plan.opt_shapes": Case("video:1x5x3x64x64", a_start),
    "plan.max_shapes": Case("video:1x5x3x512x512", a_start),
    "offload.blocks": Case(2, a_run, NO_VALIDATION, refused="needs a GPU"),
    "memory.fit": Case("auto", precomputes, SMALL_DEVICE),
    "memory.num_processes": Case(8, the_dry_run, SHARDED),
    "memory.sharding": Case("ddp", the_dry_run, SHARDED),
    "memory.device_gb": Case(80, the_dry_run, SHARDED),
}


# Settings of rewards with vision networks, whose weights `write_data` creates.
CLIP = {"rewards": [{"type": "clip", "weights": "clip"}]}
AESTHETIC = {"rewards": [{"type": "aesthetic", "weights": "clip", "predictor": "one.pth"}]}
SUBJECT = {"rewards": [{"type": "subject_consistency", "weights": "dinov2"}]}
VISION_CASES: dict[str, Case] = {
    "rewards.0.weights": Case("other_clip", a_step, CLIP),
    "rewards.0.processor": Case("other_processor", a_step, CLIP),
    "rewards.0.precision": Case("bf16", a_step, CLIP),
    "rewards.0.predictor": Case("other.pth", a_step, AESTHETIC),
    "rewards.0.anchor": Case("reference", a_step, SUBJECT),
}
CASES |= VISION_CASES


def test_no_setting_is_forgotten() -> None:
    """Cover all settings, with those of the default reward, and the fields of other rewards."""
    assert CASES.keys() - VISION_CASES.keys() == {*dotted_names(RunSettings), *OF_OTHER_REWARDS}


@pytest.mark.parametrize("name", CASES)
def test_the_setting_acts(name: str, observe: Callable[[str, Any, dict[str, Any]], Any]) -> None:
    case = CASES[name]
    if name == "device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    start = merged(BASE, case.start or {})
    before = observe("before", case.acts_on, start)
    after = observe(name, case.acts_on, merged(start, nested(name, case.value)))
    if case.refused:
        assert isinstance(after, FrostlineError)
        assert case.refused in str(after)
    else:
        assert not isinstance(after, FrostlineError), after
    assert repr(after) != repr(before)


@pytest.fixture(scope="module")
def observe(
    tmp_path_factory: pytest.TempPathFactory, engines: Path
) -> Iterator[Callable[[str, Observe, dict[str, Any]], Any]]:
    """Return a function that returns the result, or the error, under these settings, each time in a new folder."""
    data = tmp_path_factory.mktemp("data")
    write_data(data)
    known: dict[str, Any] = {}

    def look(name: str, acts_on: Observe, values: dict[str, Any]) -> Any:
        key = f"{name} {acts_on.__name__} {json.dumps(values)}"
        if key not in known:
            place = tmp_path_factory.mktemp("place")
            for source in data.iterdir():
                (place / source.name).symlink_to(source)
            (place / "built").symlink_to(engines)
            with contextlib.chdir(place):
                try:
                    known[key] = acts_on(RunSettings.parse(values))
                except FrostlineError as error:
                    known[key] = error
        return known[key]

    load = load_components
    loaded = functools.cache(load)
    with pytest.MonkeyPatch.context() as patch:
        # Each module has a copy of the weights, which are read once.
        patch.setattr(
            "frostline.models.checkpoints.loading.load_components",
            lambda model, dtype, device, defer, reads=None, storage=None, offload_blocks=0: (
                load(model, dtype, device, defer, reads, storage, offload_blocks)
                if reads or storage or offload_blocks
                else copy.deepcopy(loaded(model, dtype, str(device)))
            ),
        )
        yield look


def write_data(folder: Path) -> None:
    """Write `data`, `other` data, data of which `half` is invalid, data `reaching` out of its folder, and weights."""
    write_vision_files(folder)
    make_adapter(folder / "lora", 2, rank=2)
    raft_file(folder / "raft.pth")
    clips = held_out_clips(3, seed=2, num_frames=9, size=32)
    for index, video in enumerate(clips.video):
        write_video(folder / "data" / f"{index}.mp4", video, lossless=True)
    for name in ("other", "half", "reaching"):
        write_video(folder / name / "0.mp4", clips.video[2], lossless=True)
    sources = {"data": ["0.mp4", "1.mp4", "2.mp4"], "other": ["0.mp4"], "half": ["0.mp4", "gone.mp4"]}
    for name, videos in {**sources, "reaching": ["0.mp4", "../data/1.mp4"]}.items():
        with (folder / name / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["video", "prompt"], *([video, "a person nods"] for video in videos)])


def write_vision_files(folder: Path) -> None:
    """Write two CLIP models, another processor, two aesthetic predictors, and DINOv2."""
    write_clip(folder / "clip")
    write_clip(folder / "other_clip", seed=1)
    write_dinov2(folder / "dinov2")
    write_aesthetic(folder / "one.pth")
    write_aesthetic(folder / "other.pth", seed=1)
    shutil.copytree(folder / "clip", folder / "other_processor")
    path = folder / "other_processor" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.5, 0.5, 0.5]}))


def nested(name: str, value: Any) -> dict[str, Any]:
    """Return the value in nested mappings for a name such as `a.b`."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def merged(one: Any, other: dict[str, Any]) -> Any:
    """Return `one` with the values of `other`; entries of lists are named by their number."""
    both = list(one) if isinstance(one, list) else dict(one)
    for name, value in other.items():
        place: Any = int(name) if isinstance(both, list) else name
        inner = both[place] if isinstance(both, list) else both.get(name)
        both[place] = merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict | list) else value
    return both
