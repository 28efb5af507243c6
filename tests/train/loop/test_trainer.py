"""The training loop: what it writes, that it is reproducible, and that it trains only the LoRA."""

import json
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from steps import Clips

from frostline.errors import CheckpointError, ConfigError, DataError, TrainingError
from frostline.models.tiny.clips import held_out_clips
from frostline.train.data.dataset import Sample, collate
from frostline.train.loop.checkpoint import find_checkpoints
from frostline.train.loop.evaluation import evaluate
from frostline.train.loop.resume import find_resume
from frostline.train.loop.run_dir import claimed
from frostline.train.loop.trainer import RunOptions, train
from frostline.train.memory.offload import saved_in_main_memory
from frostline.train.settings import TrainerSettings
from frostline.train.step_settings import TrainingModuleSettings

SETTINGS = TrainerSettings(learning_rate=1e-3, max_train_steps=2, per_device_train_batch_size=1, seed=3)


@pytest.fixture(scope="module")
def clips() -> Clips:
    return Clips(2, seed=11, num_frames=9, size=96)


@pytest.fixture(scope="module")
def runs(make_module: Any, clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Path]]:
    """Run the same training twice from the same start; return the modules and folders."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for name in ("first", "second"):
        torch.manual_seed(0)
        module = make_module("tiny", noise_seed=None)
        train(module, clips, SETTINGS, folder / name)
        made.append((module, folder / name))
    return made


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_a_line_of_metrics(runs: list[tuple[Any, Path]]) -> None:
    lines = _lines(runs[0][1])
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["learning_rate"] == SETTINGS.learning_rate
        assert 0 <= line["detection_rate"] <= 1
        assert line["grad_norm"] > 0
        assert len(line["kl"]) == 4
        assert line["sample_id"][0].startswith("clip ")
        assert line["stages"]["backward"]["ms"] > 0
        assert line["stages"]["denoise_tail"]["backend"] == "torch"


def test_the_same_seed_gives_the_same_run(runs: list[tuple[Any, Path]]) -> None:
    first, second = (_lines(folder) for _, folder in runs)
    for one, other in zip(first, second, strict=True):
        assert (one["loss"], one["kl"], one["sample_id"]) == (other["loss"], other["kl"], other["sample_id"])
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for _, folder in runs]
    assert adapters[0] == adapters[1]


def test_only_the_lora_moves(runs: list[tuple[Any, Path]], make_module: Any) -> None:
    trained, fresh = runs[0][0], make_module("tiny")
    lora = trained.trainable_parameters()
    start = fresh.trainable_parameters()
    assert any(not torch.equal(lora[name], start[name]) for name in lora)
    frozen = {name: p for name, p in trained.components.denoiser.named_parameters() if name not in lora}
    before = dict(fresh.components.denoiser.named_parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())


def test_evaluation_does_not_depend_on_the_batch(make_module: Any, clips: Clips) -> None:
    module = make_module("tiny")
    together, alone = (evaluate(module, clips, range(2), batch_size=size) for size in (2, 1))
    torch.testing.assert_close(together.videos, alone.videos, atol=1e-4, rtol=0)
    torch.testing.assert_close(together.measured["face_score"], alone.measured["face_score"], atol=1e-3, rtol=0)
    assert together.measured["psnr"].shape == together.measured["detection_rate"].shape == (2,)
    expected = -10 * torch.log10((together.videos - clips.clips.video).pow(2).flatten(1).mean(1))
    torch.testing.assert_close(together.measured["psnr"], expected)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rat": 1}, "learning_rate"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"max_train_steps": 0}, "max_train_steps"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainerSettings.parse(values)


def test_nested_settings_name_where_they_are_wrong() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.0\.weigth: unknown setting, did you mean weight"):
        TrainingModuleSettings.parse({"rewards": [{"type": "sharpness", "weigth": 1}]})


def _run(
    module: Any, clips: Clips, out: Path, steps: int = 2, options: RunOptions | None = None, **changes: Any
) -> Any:
    settings = {"learning_rate": 1e-3, "max_train_steps": steps, "checkpointing_steps": 1, "seed": 3, **changes}
    return train(module, clips, TrainerSettings.parse(settings), out, options)


QUICK: dict[str, Any] = {
    "num_inference_steps": 3,
    "grad_start_step": 1,
    "grad_end_step": 2,
    "rewards": [{"type": "sharpness", "baseline": 0.0, "scale": 1.0}],
}


class _Small(Clips):
    def __init__(self, count: int) -> None:
        self.clips = held_out_clips(count, seed=11, num_frames=5, size=32)


@pytest.fixture(scope="module")
def small() -> _Small:
    return _Small(3)


def _poison(module: Any, steps: set[int]) -> None:
    """Make the loss of these forwards NaN; they are counted from 1."""
    forward, count = module.forward, iter(range(1, 1000))

    def poisoned(data: Any) -> Any:
        loss, score, kl = forward(data)
        return (loss * math.nan if next(count) in steps else loss), score, kl

    module.forward = poisoned


def _adapter(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


def test_a_step_without_a_finite_loss_is_skipped_and_counted(
    make_module: Any, small: _Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(**QUICK)
    _poison(module, {2})
    outcome = _run(module, small, tmp_path, steps=3)
    assert (outcome.step, outcome.skipped, outcome.stopped_by) == (3, 1, None)
    assert [line["skipped"] for line in _lines(tmp_path)] == [False, True, False]
    assert _lines(tmp_path)[1]["loss"] is None
    assert (
        _adapter(tmp_path / "checkpoint-1")
        == _adapter(tmp_path / "checkpoint-2")
        != _adapter(tmp_path / "checkpoint-3")
    )
    assert "step 2: the loss or its gradient is not finite" in caplog.text


def test_too_many_in_a_row_end_the_run_and_lose_nothing(make_module: Any, small: _Small, tmp_path: Path) -> None:
    module = make_module(**QUICK)
    _poison(module, {1, 3, 4})
    with pytest.raises(TrainingError, match="2 consecutive steps, up to step 4"):
        _run(module, small, tmp_path, steps=9, max_skipped_steps=2, checkpointing_steps=50)
    found = find_resume(tmp_path, "latest")
    assert found is not None
    assert found.step == 4


class _BreaksAt(_Small):
    def __init__(self, number: int) -> None:
        super().__init__(3)
        self.left = number

    def __getitem__(self, index: int) -> Sample:
        self.left -= 1
        if self.left < 0:
            raise DataError(f"sample {index}, field 'video': is broken")
        return super().__getitem__(index)


def test_a_broken_sample_ends_the_run_after_saving_what_came_before(make_module: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is broken"):
        _run(make_module(**QUICK), _BreaksAt(2), tmp_path, steps=9, checkpointing_steps=50)
    found = find_resume(tmp_path, "latest")
    assert found is not None
    assert found.step == 2
    # With a valid sample, the resumed run ends like an undisturbed run.
    outcome = _run(make_module(**QUICK), _Small(3), tmp_path, steps=3, options=RunOptions(resume=found))
    whole = tmp_path / "whole"
    _run(make_module(**QUICK), _Small(3), whole, steps=3)
    assert outcome.step == 3
    assert _adapter(tmp_path / "adapter") == _adapter(whole / "adapter")


class _Machines:
    """A supervisor that requests a checkpoint after step 1, and the end of the run after step 3."""

    def __init__(self) -> None:
        self.steps = -1
        self.began = False

    def begun(self) -> None:
        self.began = True

    def stop_asked(self) -> signal.Signals | None:
        self.steps += 1
        return signal.SIGTERM if self.steps == 3 else None

    def save_asked(self) -> bool:
        return self.steps == 1


def test_what_manages_the_machines_may_ask_for_a_checkpoint_and_the_end(make_module: Any, tmp_path: Path) -> None:
    machines = _Machines()
    options = RunOptions(supervisor=machines)
    outcome = _run(make_module(**QUICK), _Small(3), tmp_path, 9, options, checkpointing_steps=50)
    assert machines.began
    assert (outcome.step, outcome.stopped_by) == (3, signal.SIGTERM)
    assert [checkpoint.step for checkpoint in find_checkpoints(tmp_path)] == [1, 3]


BRIGHTNESS = {"type": "own_rewards:Brightness", "baseline": 0.0, "scale": 1.0, "weight": 1.0}


@pytest.mark.parametrize("darkest", [False, True], ids=["all count", "one counts"])
def test_accumulated_forwards_are_one_batch(make_module: Any, tmp_path: Path, darkest: bool) -> None:
    clips = _Small(2)
    options = {"darkest": clips.clips.video.mean().item() if darkest else 0.0}
    settings = {**QUICK, "kl_weight": 0.0, "rewards": [{**BRIGHTNESS, "options": options}]}
    for name, sizes in (("batch", (2, 1)), ("accumulated", (1, 2))):
        batch, times = sizes
        _run(
            make_module(**settings),
            clips,
            tmp_path / name,
            steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=times,
            max_grad_norm=1e9,
        )
    one, other = (_lines(tmp_path / name)[0] for name in ("batch", "accumulated"))
    assert one["sample_id"] == other["sample_id"]
    assert one["score"] == one["brightness"] == pytest.approx(other["score"], rel=1e-4)
    # Every forward has the same weight: one without a valid sample counts as a loss of 0.
    part = 0.5 if darkest else 1.0
    assert one["grad_norm"] > 0
    assert one["grad_norm"] * part == pytest.approx(other["grad_norm"], rel=1e-4)
    assert one["loss"] * part == pytest.approx(other["loss"], rel=1e-4)


def test_where_nothing_can_be_scored_there_is_no_score(make_module: Any, small: _Small, tmp_path: Path) -> None:
    module = make_module(**{**QUICK, "rewards": [{**BRIGHTNESS, "options": {"darkest": 2.0}}]})
    _run(module, small, tmp_path, steps=1)
    (line,) = _lines(tmp_path)
    assert line["score"] is None and line["brightness"] is None and math.isfinite(line["loss"])


def test_the_environment_overrides_no_setting(
    make_module: Any, small: _Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    _run(make_module(**QUICK), small, tmp_path, steps=1)
    assert _lines(tmp_path)[0]["grad_norm"] > 0


def test_to_go_on_elsewhere_spares_the_run_that_is_there(make_module: Any, small: _Small, tmp_path: Path) -> None:
    for name in ("one", "other"):
        _run(make_module(**QUICK), small, tmp_path / name, steps=1)
    before = (tmp_path / "other" / "metrics.jsonl").read_bytes()
    resume = RunOptions(resume=find_resume(tmp_path / "one", "latest"))
    with pytest.raises(ConfigError, match="other already contains a run"):
        _run(make_module(**QUICK), small, tmp_path / "other", steps=2, options=resume)
    assert (tmp_path / "other" / "metrics.jsonl").read_bytes() == before
    _run(make_module(**QUICK), small, tmp_path / "new", steps=2, options=resume)
    assert [line["step"] for line in _lines(tmp_path / "new")] == [1, 2]


def test_the_learning_rate_follows_its_schedule_also_after_a_resume(
    make_module: Any, small: _Small, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"lr_scheduler_type": "linear", "lr_warmup_steps": 2}
    _run(make_module(**QUICK), small, tmp_path, steps=4, **changes)
    for path in tmp_path.glob("checkpoint-[34]"):
        shutil.rmtree(path)
    resumed = RunOptions(resume=find_resume(tmp_path, "latest"))
    _run(make_module(**QUICK), small, tmp_path, steps=4, options=resumed, **changes)
    assert [line["learning_rate"] for line in _lines(tmp_path)] == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3, 4]


def test_what_was_saved_for_another_adapter_is_refused(make_module: Any, small: _Small, tmp_path: Path) -> None:
    _run(make_module(**QUICK), small, tmp_path, steps=1)
    options = RunOptions(resume=find_resume(tmp_path, "latest"))
    with pytest.raises(ConfigError, match="the adapter has rank 8, not 4"):
        _run(make_module(lora={"rank": 4}, **QUICK), small, tmp_path, options=options)


def test_one_run_at_a_time_and_none_over_another(make_module: Any, small: _Small, tmp_path: Path) -> None:
    module = make_module(**QUICK)
    with claimed(tmp_path), pytest.raises(CheckpointError, match="another run is writing to it"):
        _run(module, small, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    _run(module, small, tmp_path, steps=1)
    with pytest.raises(ConfigError, match="already contains a run"):
        _run(module, small, tmp_path)
    _run(module, small, tmp_path, steps=1, options=RunOptions(overwrite=True))
    assert len(_lines(tmp_path)) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_named(make_module: Any, small: _Small, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(CheckpointError, match=f"{out}: cannot be written to"):
            _run(make_module(**QUICK), small, out)


def test_saved_tensors_can_wait_in_main_memory(make_module: Any, small: _Small) -> None:
    batch = collate([small[0], small[1]])
    gradients = []
    for offload in (False, True):
        module = make_module(offload_saved_tensors=offload, **QUICK)
        module(batch)[0].backward()
        gradients.append([parameter.grad for parameter in module.trainable_parameters().values()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_only_activations_are_copied_to_main_memory() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    hooks = saved_in_main_memory(layer.parameters())
    with hooks:
        assert hooks.pack_hook(layer.weight.t())[1].data_ptr() == layer.weight.data_ptr()
        assert hooks.pack_hook(x)[1].data_ptr() != x.data_ptr()
        total = layer(x * 2).sum()
    total.backward()
    torch.testing.assert_close(x.grad, 2 * layer.weight.sum(dim=0).expand(2, 4))


@pytest.fixture
def other_precision() -> Iterator[None]:
    """accelerate fixes one precision per process until its state is reset."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("other_precision")
def test_bf16_trains_fp32_weights(make_module: Any, small: _Small, tmp_path: Path) -> None:
    module = make_module(dtype=torch.bfloat16, **QUICK)
    # The step is far smaller than the resolution of bf16, so it needs a master weight in fp32.
    _run(module, small, tmp_path, steps=2, mixed_precision="bf16", learning_rate=1e-6)
    moments = load_file(tmp_path / "checkpoint-2" / "optimizer.safetensors")
    first, second = (load_file(tmp_path / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (1, 2))
    assert {tensor.dtype for tensor in (*moments.values(), *second.values())} == {torch.float32}
    moved = torch.cat([(second[name] - first[name]).abs().flatten() for name in first])
    assert 0 < moved.max() < 2e-6
    assert all(line["loss"] is not None for line in _lines(tmp_path))
