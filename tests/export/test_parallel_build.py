"""Building in several processes gives the same verified engines as building in one process."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from frostline.export import parallel_build as jobs_file
from frostline.export.model import load_staged_model
from frostline.export.parallel_build import build_ahead, fitting_jobs
from frostline.export.recipe import Recipe
from frostline.export.run import ExportOptions, export_model
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.engines.store import EngineStore
from frostline.stages.staged_model import StagedModel

pytestmark = pytest.mark.timeout(400)

STAGES = ("text_encoder", "face_embedder")
RECIPE = Recipe(model="tiny", stages=STAGES, backends=("onnxruntime", "tensorrt-rtx"))


@pytest.fixture(scope="module")
def staged() -> StagedModel:
    return load_staged_model(RECIPE, "cpu")


def test_two_processes_build_and_this_one_verifies(staged: StagedModel, tmp_path: Path) -> None:
    store, said = EngineStore(tmp_path), list[str]()
    there = RECIPE.model_copy(update={"stages": STAGES[:1], "backends": ("onnxruntime",)})
    assert [row.status for row in export_model(staged, there, store, ExportOptions())] == ["built"]
    options = ExportOptions(jobs=2)
    rows = list(export_model(staged, RECIPE, store, replace(options, force=True), said.append))
    assert [(row.stage, row.backend) for row in rows] == [(s, b) for s in STAGES for b in RECIPE.backends]
    assert {row.status for row in rows} == {"built"}
    assert any("of 2 stages built" in step for step in said)
    assert not any(": trace" in step for step in said), "nothing was left for this process to build"
    for row in rows:
        assert row.manifest is not None
        assert row.manifest.verified == (row.backend == "onnxruntime"), row.note
        assert row.seconds >= row.manifest.build_seconds
    # The other processes stored the engines under the keys that this process computes.
    again = list(export_model(staged, RECIPE, store, options))
    assert {row.status for row in again} == {"present"}


def test_a_process_that_dies_leaves_the_work_to_this_one(
    staged: StagedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # No process can load the model on this device, as if memory were missing.
    store = EngineStore(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StagedModel, "device", "meta")
        built = build_ahead(staged, RECIPE, [*staged.stages.values()][:1], store, BuildOptions(), jobs=1)
    assert built == {}
    assert "continuing in this process" in caplog.text
    assert not list(store.find())


def test_as_many_jobs_as_memory_takes(staged: StagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_file.os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(jobs_file, "free_bytes", lambda device: 2**40)
    assert fitting_jobs(staged) == len(staged.stages)
    monkeypatch.setattr(jobs_file, "free_bytes", lambda device: 7 * 2**30)
    assert fitting_jobs(staged) == 2
    monkeypatch.setattr(jobs_file, "free_bytes", lambda device: 2**20)
    assert fitting_jobs(staged) == 1


def test_asking_again_needs_no_torch() -> None:
    """Report that all engines exist without importing torch, which takes seconds."""
    modules = ("cli.exporting", "export.export_cache", "export.tables", "progress")
    asked = "import sys, " + ", ".join(f"frostline.{module}" for module in modules)
    cache = "frostline.export.export_cache"
    recipe = f"{cache}.receipt_key({cache}.Recipe(model='tiny'), Options(), 'auto', {{}})"
    code = f"{asked}\nfrom frostline.runtime.backends.base.options import BuildOptions as Options\n{recipe}\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
