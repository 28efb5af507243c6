"""`memory.fit: auto`: which settings a run changes, what it reports about that, and when it is refused."""

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from frostline.documents import read_yaml
from frostline.errors import ConfigError
from frostline.models.tiny.clips import held_out_clips
from frostline.progress import Progress
from frostline.train.dry_run import print_dry_run
from frostline.train.fit_memory import fit_to_memory
from frostline.train.launch import run_precompute, run_training
from frostline.train.memory.search import with_changes
from frostline.train.run_plan import RunPlanner
from frostline.train.settings import RunSettings
from frostline.train.validate_settings import check_offload
from frostline.video import write_video

SAMPLES, SIZES = (2, 0), [(64, 64)]
# The cheap measure, and the one that is left then: a window of one latent frame.
CHEAP = {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 2}
DEAR = {"decode.num_latent_frames": 1}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """Return the settings of a run of one step on two clips of 64x64."""
    folder = tmp_path_factory.mktemp("fit")
    clips = held_out_clips(2, seed=2, num_frames=9, size=64)
    for index, (video, prompt) in enumerate(zip(clips.video, clips.prompts, strict=True)):
        write_video(folder / "data" / f"{index}.mp4", video, lossless=True)
        (folder / "data" / f"{index}.txt").write_text(prompt)
    return RunSettings.parse(
        {
            "model": "tiny",
            "device": "cpu",
            "output_dir": str(folder / "run"),
            "precompute": "never",
            "gradient_checkpointing": "none",
            "lora": {"rank": 2},
            "plan": {"backend": "torch"},
            "rewards": [{"type": "sharpness"}],
            "data": {"source": str(folder / "data"), "num_frames": 9},
            "train": {"max_train_steps": 1, "per_device_train_batch_size": 2},
            "memory": {"fit": "auto"},
        }
    )


@pytest.fixture(scope="module")
def sizes(settings: RunSettings) -> dict[str, int]:
    """Return the bytes that the run needs without changes, with the cheap measure, and with further ones."""
    planner = RunPlanner(settings, None, True, SAMPLES, SIZES)
    blocks = {"gradient_checkpointing": "full"}
    changes: dict[str, dict[str, Any]] = {"as it is": {}, "cheap": CHEAP, "block": CHEAP | blocks, "dear": CHEAP | DEAR}
    made = {name: with_changes(settings, each) for name, each in changes.items()}
    return {name: planner.plan(each).needed for name, each in made.items()}


def on_device(settings: RunSettings, nbytes: int) -> RunSettings:
    return with_changes(settings, {"memory.device_gb": nbytes / 1e9})


def fitted(settings: RunSettings) -> RunSettings:
    return fit_to_memory(settings, settings.memory, True, SAMPLES, SIZES)


def test_a_run_that_fits_stays_as_it_is(
    settings: RunSettings, sizes: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    large = on_device(settings, sizes["as it is"] + 1000)
    assert fitted(large) is large
    assert caplog.text == ""


def test_what_changes_nothing_comes_first_and_what_does_is_warned_of(
    settings: RunSettings, sizes: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    middle, small = (on_device(settings, sizes[name] + 1000) for name in ("cheap", "dear"))
    assert fitted(middle) == with_changes(middle, CHEAP)
    assert {record.levelname for record in caplog.records} == {"INFO"}
    caplog.clear()
    found = fitted(small)
    assert found.decode.num_latent_frames == 1
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "decode.num_latent_frames=1: score only a window" in warning
    assert "this changes what is trained" in warning


@pytest.mark.parametrize("fit", ["auto", "never"])
def test_a_number_takes_the_place_of_auto(settings: RunSettings, fit: str, caplog: pytest.LogCaptureFixture) -> None:
    """Choose the number before other settings are changed, and also if they may not be changed."""
    caplog.set_level(logging.INFO)
    auto = with_changes(settings, {"offload.blocks": "auto", "memory.fit": fit, **CHEAP})
    planner = RunPlanner(auto, None, False, SAMPLES, SIZES)
    needs = {
        count: planner.plan(each).needed for count in (0, 3) if (each := with_changes(auto, {"offload.blocks": count}))
    }
    for count, nbytes in needs.items():
        there = on_device(auto, nbytes)
        found = fit_to_memory(there, there.memory, False, SAMPLES, SIZES)
        assert found == with_changes(there, {"offload.blocks": count})
        assert f"offload.blocks: auto: {count} blocks of each denoiser are offloaded to main memory" in caplog.text


def test_blocks_wait_for_a_gpu_alone_and_for_one_process(settings: RunSettings) -> None:
    two = with_changes(settings, {"offload.blocks": 2})
    with pytest.raises(ConfigError, match=r"offload\.blocks: needs a GPU"):
        run_training(two, None, Progress(quiet=True))
    with pytest.raises(ConfigError, match=r"offload\.blocks: needs a GPU"):
        run_precompute(two, Progress(quiet=True))
    page = io.StringIO()
    assert not print_dry_run(two, Console(file=page, width=200))
    assert "offload.blocks: needs a GPU" in page.getvalue()
    page = io.StringIO()
    on_gpu = with_changes(two, {"device": "cuda", "memory.device_gb": 24, "memory.fit": "never"})
    assert print_dry_run(on_gpu, Console(file=page, width=200))
    assert "2 blocks of each denoiser are offloaded to main memory" in page.getvalue()
    with pytest.raises(ConfigError, match=r"one process only, not 2: .* FSDP2"):
        check_offload(two.offload.blocks, on_cpu=False, processes=2)
    check_offload("auto", on_cpu=True)
    for refused in ({"memory.num_processes": 2}, {"memory.sharding": "fsdp"}, {"torch_compile": True}):
        with pytest.raises(ConfigError, match=r"offload\.blocks: "):
            with_changes(two, refused)


def test_nothing_that_a_run_can_change_is_enough(settings: RunSettings) -> None:
    with pytest.raises(ConfigError, match=r"memory\.fit: auto: .* needed for videos of any size"):
        fitted(on_device(settings, 10**6))


def test_the_run_has_the_settings_that_it_was_fitted_with(settings: RunSettings, sizes: dict[str, int]) -> None:
    small = on_device(settings, sizes["dear"] + 1000)
    page = io.StringIO()
    assert print_dry_run(small, Console(file=page, width=200))
    assert "memory.fit: auto: it fits with" in page.getvalue()
    assert "the run can begin" in page.getvalue()
    outcome = run_training(small, None, Progress(quiet=True))
    assert outcome.step == 1
    written = RunSettings.parse(read_yaml(small.output_dir / "config.yaml"))
    assert written == fitted(small)
    assert (written.train.per_device_train_batch_size, written.train.gradient_accumulation_steps) == (1, 2)
    assert written.decode.num_latent_frames == 1
    never = with_changes(small, {"memory.fit": "never", "output_dir": str(Path(small.output_dir).parent / "other")})
    page = io.StringIO()
    assert not print_dry_run(never, Console(file=page, width=200))
