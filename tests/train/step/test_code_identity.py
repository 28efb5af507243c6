"""Results that are stored under an id of their code: each of six kinds is valid until code or a package changes."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import QUICK, small_clips
from torch import Tensor

import frostline
from frostline.export.export_cache import Receipt, recall, receipt_key, remember
from frostline.export.exporter import export_stage
from frostline.export.model import load_staged_model
from frostline.export.recipe import Recipe
from frostline.rewards.build import build_rewards
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.identity import computation
from frostline.runtime.identity.fingerprint import find_engine, stage_computation, weights_sha256
from frostline.runtime.planning.autotune import LatencyNote
from frostline.stages.shapes import ShapeRange
from frostline.stages.staged_model import StagedModel
from frostline.train import WanTrainingModule
from frostline.train.step.conditioning import Conditioner

MakeModule = Callable[..., WanTrainingModule]
Edit = Callable[[str, str, str], None]

STAGE, BACKEND = "face_embedder", "onnxruntime"
RECIPE = Recipe(model="tiny", stages=(STAGE,), backends=(BACKEND,))
CPU = torch.device("cpu")
KINDS = {"engine", "receipt", "latency", "references", "context", "y"}
# All operations of a face embedder are in this file.
OPERATIONS = "models/onnx/ops.py"
CONSTANT = "1e-5"


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """`edit(file, old, new)`: replace text in a copy of the code; frostline's code ids are computed from this copy."""
    copy = tmp_path / "copy" / "frostline"
    ignore = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(Path(frostline.__file__).parent, copy, ignore=ignore)
    assert frostline.__spec__ is not None
    monkeypatch.setattr(frostline.__spec__, "submodule_search_locations", [str(copy)])
    monkeypatch.setattr(frostline.__spec__, "origin", str(copy / "__init__.py"))
    computation._find.cache_clear()

    def edit(file: str, old: str, new: str) -> None:
        path = copy / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    yield edit
    monkeypatch.undo()
    computation._find.cache_clear()


@dataclass
class Kept:
    """Store one result of each kind, and report which of them are still read."""

    staged: StagedModel
    module: WanTrainingModule
    store: EngineStore

    def keep(self) -> None:
        stage = self.staged.stages[STAGE]
        engine = export_stage(stage, BACKEND, self.store).manifest
        assert engine.tolerance is not None
        remember(self.store, self._receipt(), [Receipt.of(engine, engine.tolerance)])
        self._note().write({"torch": 1.0})
        self._look_up()

    def reused(self) -> set[str]:
        stage = self.staged.stages[STAGE]
        kinds = self._look_up()
        if find_engine(self.store, stage, BACKEND, weights_sha256(stage)) is not None:
            kinds.add("engine")
        if recall(self.store, self._receipt()) is not None:
            kinds.add("receipt")
        if self._note().read() is not None:
            kinds.add("latency")
        return kinds

    def _receipt(self) -> str:
        return receipt_key(RECIPE, BuildOptions(), "cpu", {})

    def _note(self) -> LatencyNote:
        return LatencyNote(STAGE, {"torch": stage_computation(self.staged.stages[STAGE])}, "x:1", CPU)

    def _look_up(self) -> set[str]:
        """Return the conditions of a sample that the cache contains."""
        module, cache = self.module, self.module.parts.cache
        assert cache is not None
        rewards = build_rewards(module.settings.rewards, CPU, ShapeRange())
        known = set[str]()

        class Watched(Conditioner):
            def cached_rows(self, what: str, *others: Any) -> dict[str, Tensor]:
                misses = cache.misses
                rows = super().cached_rows(what, *others)
                if cache.misses == misses:
                    known.add(what)
                return rows

        Watched(module.model, module.runtime, rewards, cache)(small_clips(1))
        return known


@pytest.fixture(scope="module")
def parts(make_module: MakeModule, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    cache = tmp_path_factory.mktemp("cache")
    store = EngineStore(tmp_path_factory.mktemp("engines"))
    return Kept(load_staged_model(RECIPE, "cpu"), make_module(cache_dir=cache, **QUICK), store)


@pytest.fixture
def kept(parts: Kept, edit: Edit) -> Kept:
    parts.keep()
    assert parts.reused() == KINDS
    return parts


def test_a_constant_makes_invalid_what_runs_it(kept: Kept, edit: Edit) -> None:
    edit(OPERATIONS, CONSTANT, "2e-5")
    assert kept.reused() == {"context", "y"}, "the conditions do not run the changed code"


def test_words_about_it_change_nothing(kept: Kept, edit: Edit) -> None:
    edit(OPERATIONS, CONSTANT, f"(  # how much\n {CONSTANT})")
    edit(OPERATIONS, '"""', '"""Said in another way. ')
    edit("runtime/planning/choosing.py", "_WORTH_A_TRIAL = 2", "_WORTH_A_TRIAL = 3")
    assert kept.reused() == KINDS


@pytest.mark.parametrize(
    ("file", "gone"),
    [
        ("models/wan/text.py", {"context", "y"}),  # one module computes both
        ("stages/wan/conditions.py", {"context", "y"}),
        ("models/wan/vae_chunks.py", {"y"}),
        ("train/step/conditioning.py", {"references"}),
        ("models/faces/identity.py", {"references"}),
        ("runtime/planning/autotune.py", {"latency"}),
        ("export/tracing/torch_export.py", {"engine", "receipt"}),
        ("runtime/backends/onnxruntime.py", {"engine", "receipt"}),
        ("runtime/backends/openvino.py", set()),
    ],
)
def test_what_does_not_run_it_stays(kept: Kept, edit: Edit, file: str, gone: set[str]) -> None:
    edit(file, "import torch", "import torch\n_X = 1")
    assert kept.reused() == KINDS - gone


def test_an_export_of_a_models_stages_depends_on_its_code(edit: Edit) -> None:
    """The key of an export of rewards only (`RECIPE`) does not change, because no model is loaded for it."""

    def keys() -> tuple[str, str]:
        recipes = (RECIPE, RECIPE.model_copy(update={"stages": (STAGE, "text_encoder")}))
        of_rewards, of_model = (receipt_key(recipe, BuildOptions(), "cpu", {}) for recipe in recipes)
        return of_rewards, of_model

    before = keys()
    edit("models/wan/text.py", "import torch", "import torch\n_X = 1")
    after = keys()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_another_version_of_a_package_makes_invalid_what_calls_it(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = computation._installed

    def upgraded(top: str) -> str | None:
        return "diffsynth 99" if top == "diffsynth" else installed(top)

    monkeypatch.setattr(computation, "_installed", upgraded)
    assert kept.reused() == {"engine", "receipt", "latency", "references"}
    monkeypatch.setattr(computation, "_installed", lambda top: "torch 99" if top == "torch" else installed(top))
    assert kept.reused() == set()
