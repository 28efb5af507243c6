"""Every setting of a run has an effect: each is changed alone, and its observed result must change.

Other tests check that the effect is right.
"""

import contextlib
import copy
import csv
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import make_adapter
from raft_file import raft_file
from setting_effects import (
    Observe,
    a_run,
    a_start,
    a_step,
    compiled,
    faces,
    folders,
    held_out,
    judging,
    never_finite,
    precomputed,
    precomputes,
    samples,
    the_dry_run,
    twice,
    two_faces,
    workers,
)
from vision_files import write_aesthetic, write_clip, write_dinov2

from frostline.config import dotted_names
from frostline.errors import FrostlineError
from frostline.models.checkpoints.loading import load_components
from frostline.models.tiny.clips import held_out_clips
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
