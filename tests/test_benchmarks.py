"""The arithmetic of the benchmarks; README and docs show the measured values."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from frostline.recipes import recipe_names, training_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import epochs  # noqa: E402
import hardware  # noqa: E402
from contenders import CONTENDERS, Outcome, Tolerance, compare  # noqa: E402
from measuring import interleave, medians, peak_growth_mib, ratio, summary  # noqa: E402
from roofline import Ceilings, Work, measure_work  # noqa: E402
from scaling import plot, wanted_axes  # noqa: E402
from syncs import count_places  # noqa: E402
from table import (  # noqa: E402
    BEGIN,
    END,
    PAGES,
    TABLES,
    contender_table,
    epochs_table,
    render,
    savings_table,
    step_table,
    tables_of,
    with_tables,
)

CPU = torch.device("cpu")


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = interleave(runs, rounds=2, device=CPU)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_ratio_is_taken_within_each_round() -> None:
    # The second round was at least ten times as slow for both contenders.
    samples = {"slow": [30.0, 400.0, 20.0], "fast": [10.0, 100.0, 10.0]}
    assert ratio(samples, "slow", "fast") == {"median": 3.0, "quartile_1": 2.0, "quartile_3": 4.0}
    assert summary(samples)["fast"]["median_ms"] == 10.0
    assert summary({"once": [5.0]})["once"] == {"median_ms": 5.0, "quartile_1_ms": 5.0, "quartile_3_ms": 5.0}


def test_a_stage_that_did_not_run_took_no_time() -> None:
    assert medians([{"a": 1.0, "b": 4.0}, {"a": 3.0}, {"a": 2.0}]) == {"a": 2.0, "b": 0.0}


def test_peak_memory_is_that_of_the_call() -> None:
    def use(mebibytes: int) -> None:
        torch.zeros(mebibytes * 2**18).add_(1)

    large, small = peak_growth_mib(lambda: use(200), CPU), peak_growth_mib(lambda: use(20), CPU)
    assert 190 <= large <= 260
    assert 10 <= small <= 80


def test_who_computes_something_else_is_found_out() -> None:
    gradient = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    outcomes = {
        "base": Outcome(1.0, 0.5, 0.1, gradient),
        "same": Outcome(1.0 + 1e-6, 0.5, 0.1, gradient * (1 + 1e-6)),
        "other loss": Outcome(1.1, 0.5, 0.1, gradient),
        "other gradient": Outcome(1.0, 0.5, 0.1, -gradient),
    }
    checks = compare(outcomes, "base", Tolerance(loss=1e-3, cosine=0.999))
    assert [name for name, check in checks.items() if check["same"]] == ["base", "same"]


def test_the_steps_of_two_epochs_are_told_apart() -> None:
    assert epochs.by_epoch([3.0, 5.0, 4.0, 1.0, 2.0, 1.0], 3) == {"first_epoch_ms": 4000, "second_epoch_ms": 1000}


def test_the_table_of_two_epochs() -> None:
    def row(what: str, first: float, seconds: float) -> dict[str, Any]:
        return {"what": what, "first_epoch_ms": first, "second_epoch_ms": 1001.6, "seconds": seconds}

    contenders = {"never": row("without", 1500.4, 60.04), "always": row("with", 1000, 58)}
    result = {"what": "tiny, 8 clips", "contenders": contenders, "machine": step_result()["machine"]}
    lines = epochs_table(result).splitlines()
    assert lines[0] == "| Two epochs: tiny, 8 clips | ms a step, first epoch | second epoch | s, whole run |"
    assert lines[2:4] == ["| without | 1500 | 1002 | 60.0 |", "| with | 1000 | 1002 | 58.0 |"]


def test_axes_by_name() -> None:
    assert list(wanted_axes("tail,batch")) == ["tail", "batch"]
    assert {"frames", "pixels", "batch", "rank", "tail"} == set(wanted_axes(""))


def test_places_are_told_by_the_innermost_line_of_frostline() -> None:
    item, step = "aten::_local_scalar_dense", ["<built-in method>", "frostline/train/step.py(7): go", "run.py(1): main"]
    events = [(item, step), (item, step), (item, ["run.py(1): main"]), ("aten::add", step), ("aten::nonzero", [])]
    assert count_places(events) == [
        ((item, "frostline/train/step.py(7): go"), 2),
        ((item, "run.py(1): main"), 1),
        (("aten::nonzero", "unknown"), 1),
    ]


def step_result() -> dict[str, Any]:
    return {
        "arguments": {"model": "tiny", "video": "2x9x3x96x96", "precision": "fp32"},
        "machine": {"device": "a CPU", "torch_threads": 2, "versions": {"torch": "2.13"}, "commit": "abc"},
        "contenders": {
            name: {"what": what, "median_ms": 100.0 * place}
            for place, (name, what) in enumerate(CONTENDERS.items(), start=1)
        },
        "ratio_spread": {"cached_over_live_only": {"median": 1.1, "quartile_1": 1.0, "quartile_3": 1.25}},
    }


def test_the_table_of_a_step() -> None:
    lines = step_table(step_result()).splitlines()
    assert lines[0] == "| One training step of tiny, 2x9x3x96x96, fp32 | ms | relative to cached |"
    # `cached` is the seventh contender, so it takes 700 ms.
    assert lines[2] == f"| {CONTENDERS['reference']} | 100 | 0.14 |"
    assert "| cached over live only | 1.10 | 1.00 to 1.25 | ≤ 1.15 |" in lines
    assert lines[-1] == "a CPU, 2 threads; torch 2.13; commit abc."


def test_steps_of_two_models_are_in_one_table(tmp_path: Path) -> None:
    large = step_result()
    large["arguments"]["model"] = "large"
    large["contenders"] = {name: large["contenders"][name] for name in ("eager", "cached")}
    for name, result in {"step": step_result(), "step-real": large}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    lines = contender_table(tmp_path).splitlines()
    title = "One training step: ms (relative to cached)"
    assert lines[0] == f"| {title} | tiny, 2x9x3x96x96, fp32 | large, 2x9x3x96x96, fp32 |"
    assert f"| {CONTENDERS['reference']} | 100 (0.14) | - |" in lines
    assert f"| {CONTENDERS['cached']} | 700 (1.00) | 700 (1.00) |" in lines
    assert lines[-2:] == ["", "a CPU, 2 threads; torch 2.13; commit abc."], "both results are from one machine"
    assert len(lines) == 2 + len(CONTENDERS) + 2


def test_the_savings_are_computed_from_two_steps(tmp_path: Path) -> None:
    for name, denoiser in (("step-wan2.1-1.3b", 80.0), ("step-real", 160.0)):
        contenders = {
            "cached": {"median_ms": 700.0, "stages_ms": {"denoiser": denoiser}},
            "live_only": {"median_ms": 500.0},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps({"contenders": contenders}))
    assert savings_table(tmp_path).splitlines()[2:] == [
        "| the defaults | 0 | 700 | 1.40 | 700 | 1.40 |",
        "| `kl_steps: random:1` | 3 | 670 | 1.34 | 640 | 1.28 |",
        "| `policy: base` | 4 | 660 | 1.32 | 620 | 1.24 |",
        "| both | 7 | 630 | 1.26 | 560 | 1.12 |",
    ]


def test_a_missing_step_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text(json.dumps(step_result()))
    assert contender_table(tmp_path).startswith(
        "| One training step: ms (relative to cached) | tiny, 2x9x3x96x96, fp32 |\n"
    )


def test_tables_are_put_between_their_marks(tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text(json.dumps(step_result()))
    tables = render(tmp_path, TABLES)
    page = with_tables(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n", tables)
    assert page.startswith(f"before\n\n{BEGIN}\n\n| One training step")
    assert page.endswith(f"{END}\n\nafter\n")
    assert tables_of(page) == tables
    assert with_tables(page, tables) == page
    with pytest.raises(SystemExit, match="no place for the tables"):
        with_tables("a page without marks", tables)


@pytest.mark.parametrize("place", PAGES, ids=lambda place: f"{place[0].name} {place[1]}")
def test_pages_show_what_was_measured(place: tuple[Path, str]) -> None:
    page, begin = place
    shown = tables_of(page.read_text(), begin)
    assert shown == PAGES[place](BENCHMARKS / "results")
    assert shown.startswith("| ")


def test_the_page_of_hardware_shows_what_was_planned() -> None:
    planned = json.loads((BENCHMARKS / "results" / "hardware.json").read_text())
    assert tables_of(hardware.PAGE.read_text(), hardware.BEGIN) == hardware.render(planned)
    assert [*planned["recipes"]] == [name for name in recipe_names() if training_config(name) is not None]


def test_what_was_planned_is_what_the_plan_says_now() -> None:
    """Compare all values of `tiny`, the smallest recipe."""
    planned = json.loads((BENCHMARKS / "results" / "hardware.json").read_text())
    assert planned["recipes"]["tiny"] == json.loads(json.dumps(hardware.plan_recipe("tiny")))


def test_the_plot_has_a_panel_for_time_and_memory_of_each_axis(tmp_path: Path) -> None:
    def point(milliseconds: float) -> dict[str, Any]:
        return {"median_ms": milliseconds, "memory_mib": milliseconds / 2}

    rows = [{"tail": steps, "cached": point(100.0 * steps), "eager": point(150.0 * steps)} for steps in (1, 2, 4)]
    base = {"batch": 1, "frames": 5, "pixels": 64, "rank": 8, "tail": 4}
    plot(
        {"base": base, "axes": {"tail": rows, "batch": [{**row, "batch": row["tail"]} for row in rows]}},
        tmp_path / "p.png",
    )
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size == (640, 600)
        assert len(set(picture.convert("RGB").getdata())) > 100


def test_the_bound_counts_convolutions_however_they_are_called() -> None:
    x, weight = torch.randn(1, 4, 3, 8, 8), torch.randn(5, 4, 3, 3, 3)
    padding = (1, 1, 1)

    def by_name() -> list[Tensor]:
        return [torch.mkldnn_convolution(x, weight, None, padding, (1, 1, 1), (1, 1, 1), 1)]

    by_module = measure_work(lambda: [torch.conv3d(x, weight, None, 1, 1)], [x], [weight])
    assert measure_work(by_name, [x], [weight, weight]) == by_module
    assert by_module == Work(operations=2 * 5 * 3 * 64 * 4 * 27, bytes=4 * (x.numel() + weight.numel() + 5 * 3 * 64))
    assert by_module.milliseconds(Ceilings(operations=1e9, bytes=1e12)) == pytest.approx(by_module.operations / 1e6)
    assert by_module.milliseconds(Ceilings(operations=1e15, bytes=1e6)) == pytest.approx(by_module.bytes / 1e3)
