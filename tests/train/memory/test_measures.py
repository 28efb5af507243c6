"""Measures that save memory: each one reduces the memory plan, and the search finds what the plan confirms."""

import io
from typing import Any

import pytest
from rich.console import Console

from frostline.train.memory.advice import memory_problem
from frostline.train.memory.measures import MEASURES, Measure, Planner
from frostline.train.memory.search import find_remedy, with_changes
from frostline.train.memory.table import memory_table
from frostline.train.run_plan import RunPlanner
from frostline.train.settings import RunSettings

LARGE: dict[str, Any] = {
    "model": "tiny-moe",
    "device": "cuda",
    "lora": {"rank": 32},
    "gradient_checkpointing": "none",
    "precompute": "never",
    "rewards": [{"type": "sharpness"}],
    "data": {"num_frames": 17, "max_pixels": 96 * 96},
    "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
}
# The sizes that several tests need are measured once.
PLANNERS: dict[str, RunPlanner] = {}


def large(**values: Any) -> RunSettings:
    return RunSettings.parse({**LARGE, **values})


def planner(device_bytes: int | None = None, on_cpu: bool = False) -> RunPlanner:
    made = PLANNERS.setdefault("tiny-moe", RunPlanner(large(), None, on_cpu))
    made.device_bytes, made.on_cpu = device_bytes, on_cpu
    return made


def needed(settings: RunSettings, on_cpu: bool = False) -> int:
    return planner(on_cpu=on_cpu).plan(settings).needed


def test_the_table_says_of_offloaded_activations_what_the_run_does() -> None:
    """Count them neither in the peak nor in the verdict; on a CPU, both count them."""
    settings = large(offload_saved_tensors=True)
    plan = planner().plan(settings)
    assert plan.offloaded_activations > 0
    assert plan.needed == needed(large()) - plan.offloaded_activations
    for short in (0, 1):
        on_device = planner(plan.needed - short).plan(settings)
        page = io.StringIO()
        Console(file=page, width=160).print(memory_table(on_device))
        assert ("does not fit" in page.getvalue()) == (short > 0)
        assert (memory_problem(on_device) is None) == (short == 0)
        assert "not in this peak: activations that are stored for backward in main memory" in page.getvalue()
    assert planner(on_cpu=True).plan(settings).offloaded_activations == 0


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.values.__name__)
def test_each_measure_needs_less(measure: Measure) -> None:
    settings, plans = large(), planner()
    found = [with_changes(settings, changes) for changes in measure.values(settings, plans)]
    assert found
    sizes = [plans.plan(settings).resident if measure.lowers == "weights" else needed(settings)]
    sizes += [plans.plan(each).resident if measure.lowers == "weights" else needed(each) for each in found]
    assert sizes == sorted({*sizes}, reverse=True), "each value of a measure must need less than the one before"


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.values.__name__)
def test_what_was_done_is_not_proposed_again(measure: Measure) -> None:
    done: dict[str, Any] = {
        "precompute": "always",
        "gradient_checkpointing": "full",
        "offload_saved_tensors": True,
        "backprop": {"strategy": "last"},
        "decode": {"num_latent_frames": 1},
        "lora": {"rank": 1},
        "data": {"num_frames": 5, "height": 16, "width": 16},
        "train": {"mixed_precision": "bf16"},
        "memory": {"num_processes": 8, "sharding": "fsdp"},
    }
    settings = large(**done)
    for changes in measure.values(settings, planner()):
        assert measure.values.__name__ == "_pixels"
        assert with_changes(settings, changes) == settings, "the smallest size cannot be reduced"


def test_measures_are_taken_until_the_run_fits_and_none_too_many() -> None:
    settings = large()
    whole = needed(settings)
    for share in (0.5, 0.1):
        device_bytes = int(share * whole)
        remedy = find_remedy(settings, planner(device_bytes))
        assert remedy.fits
        assert needed(remedy.settings) == remedy.steps[-1].together <= device_bytes
        places = [MEASURES.index(step.measure) for step in remedy.steps]
        assert places == sorted({*places})
        together = settings
        for step in remedy.steps:
            together = with_changes(together, step.changes)
            assert needed(with_changes(settings, step.changes)) == step.alone
            assert needed(together) == step.together
        assert together == remedy.settings
        for left_out in remedy.steps:
            others = settings
            for step in remedy.steps:
                others = others if step is left_out else with_changes(others, step.changes)
            assert needed(others) > device_bytes
    # A new planner, which has measured nothing yet, gives the same result.
    anew = RunPlanner(remedy.settings, None, on_cpu=False)
    assert anew.plan(remedy.settings).needed == remedy.steps[-1].together


def test_same_results_come_before_others_and_more_devices_last() -> None:
    costs = [measure.costs for measure in MEASURES]
    assert costs == sorted(costs, key=["time", "results", "devices"].index)


def test_where_weights_do_not_fit_only_they_are_made_smaller() -> None:
    settings = large(data={"num_frames": 5, "max_pixels": 32 * 32}, train={"per_device_train_batch_size": 1})
    device_bytes = planner().plan(settings).resident // 3
    remedy = find_remedy(settings, planner(device_bytes), [each for each in MEASURES if each.costs == "time"])
    assert not remedy.fits
    assert remedy.floor > device_bytes
    assert {step.measure.lowers for step in remedy.steps} == {"weights"}


def test_what_does_not_go_together_is_no_measure() -> None:
    """Motion compares neighbouring frames, which a window of the clip does not support."""
    settings = large(rewards=[{"type": "motion"}])
    device_bytes = int(0.3 * needed(settings))
    found = find_remedy(settings, planner(device_bytes))
    assert found.fits
    assert not any("decode.num_latent_frames" in step.changes for step in found.steps)


def test_on_a_cpu_main_memory_is_the_device() -> None:
    settings = large()
    assert needed(with_changes(settings, {"offload_saved_tensors": True}), on_cpu=True) == needed(settings)
    plans: Planner = planner(on_cpu=True)
    offload = next(each for each in MEASURES if each.values.__name__ == "_saved_tensors")
    assert list(offload.values(settings, plans)) == []


def test_blocks_in_main_memory_are_as_few_as_make_it_fit() -> None:
    settings = large(plan={"backend": "torch"})
    plans = planner()
    auto = with_changes(settings, {"offload.blocks": "auto"})
    sizes = {count: needed(with_changes(settings, {"offload.blocks": count})) for count in (0, 3, 4)}
    assert sizes[0] > sizes[3] > sizes[4]
    assert plans.plan(auto).offloaded_blocks == 0, "the memory of the device is not known"
    for device_bytes, count in ((sizes[0], 0), (sizes[0] - 1, 3), (sizes[3] - 1, 4), (sizes[4] - 1, 4)):
        assert planner(device_bytes).plan(auto).offloaded_blocks == count
    plan = planner(sizes[0] - 1, on_cpu=True).plan(auto)
    assert (plan.offloaded_blocks, plan.main_memory) == (0, 0)
    measure = next(each for each in MEASURES if each.values.__name__ == "_blocks")
    assert list(measure.values(auto, planner())) == []
    assert list(measure.values(settings, planner(on_cpu=True))) == []
    three = with_changes(settings, {"offload.blocks": 3})
    assert list(measure.values(three, planner())) == [{"offload.blocks": 4}]
    many = with_changes(three, {"memory.num_processes": 8, "memory.sharding": "fsdp", "offload.blocks": 0})
    assert list(measure.values(many, planner())) == []


def test_a_cache_that_is_too_small_is_enlarged() -> None:
    settings = large(cache_bytes=1)
    plans = RunPlanner(settings, None, on_cpu=False, samples=(10, 2))
    precompute = MEASURES[0]
    (changes,) = precompute.values(settings, plans)
    assert changes["cache_bytes"] > 1
    assert plans.preview(with_changes(settings, {"precompute": "always"})).stages == ()
    assert "text_encoder" in plans.preview(with_changes(settings, changes)).stages
