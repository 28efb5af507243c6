"""A backend is one file: it is found by its name, built, verified and used, and no other code refers to it."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import frostline
from frostline.errors import ConfigError, InputError
from frostline.export.export_cache import receipt_key
from frostline.export.exporter import export_stage
from frostline.export.plan_estimate import stage_gains
from frostline.export.recipe import Recipe
from frostline.runtime import backends
from frostline.runtime.backends import backend_names, check_backend, engine_packages, get_backend
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.identity.fingerprint import stage_key
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import Network, Stage, TensorSpec

PACKAGE = Path(frostline.__file__).parent
# The backends of frostline, in order of preference.
NAMES = ("onnxruntime", "tensorrt", "tensorrt-rtx", "aotinductor", "openvino")
NAME = "plain-programs"
SOURCE = '''
"""Exported programs, run by torch as they are."""

import io

import torch

from frostline.runtime.backends.base.backend import Backend
from frostline.runtime.backends.base.runner import EngineRunner


class PlainPrograms(Backend):
    source = "exported_program"
    packages = ("numpy",)
    install = "pip install numpy"

    def library(self):
        import numpy

        return numpy

    def build(self, network, source, folder, options):
        torch.export.save(source, folder / f"{network.name}.pt2")
        return f"{network.name}.pt2"

    def make_runner(self, engine, entry, network, device):
        return ProgramRunner(engine.read(entry.artifact), network)


class ProgramRunner(EngineRunner):
    library_name = "torch.export"

    def __init__(self, program, network):
        super().__init__(network)
        with self._failures("cannot load"):
            self._program = torch.export.load(io.BytesIO(program)).module()

    @torch.no_grad()
    def _run(self, inputs):
        positional = [inputs[spec.name] for spec in self._network.inputs]
        outputs = self._program(*positional, *self._network.live.values())
        return dict(zip(self._network.outputs, outputs if isinstance(outputs, tuple) else (outputs,)))
'''


class Shifted(nn.Module):
    """A layer, and a live tensor that is added to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.layer(x) + shift


@pytest.fixture
def stage() -> Stage:
    x = TensorSpec("x", (Dimension("rows", 1, 4, 64), 4))
    live = {"shift": torch.ones(4)}
    network = Network("shifted", Shifted().eval(), (x,), ("y",), live, (TensorSpec("shift", (4,)),))
    return Stage(name="shifted", model="toy", networks=(network,), tolerance=Tolerance(1e-6, 1e-6, 0.999))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the file of a backend, in a folder that is searched for backends."""
    path = tmp_path / "backends" / "plain_programs.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(path.parent)])
    get_backend.cache_clear()
    yield path
    get_backend.cache_clear()
    sys.modules.pop(f"{backends.__name__}.plain_programs", None)
    vars(backends).pop("plain_programs", None)


def test_the_backends_are_the_modules_of_the_package() -> None:
    assert backend_names() == NAMES
    assert [get_backend(name).name for name in NAMES] == [*NAMES]
    assert get_backend("openvino") is get_backend("openvino")
    with pytest.raises(ConfigError, match=f"unknown backend 'base': use one of torch, {', '.join(NAMES)}"):
        check_backend("base")


def test_asking_for_names_imports_no_backend_and_no_torch() -> None:
    code = "import sys; from frostline.runtime import backends\n"
    code += f"assert backends.backend_names() == {NAMES!r}; backends.check_backend('openvino')\n"
    code += "backends.module_name('tensorrt-rtx')\n"
    code += "loaded = [name for name in sys.modules if name.startswith('frostline.runtime.backends.')]\n"
    code += "assert not loaded and 'torch' not in sys.modules, loaded"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_new_file_is_a_backend(file: Path) -> None:
    assert backend_names() == (*NAMES, NAME), "other backends must follow in the order of their names"
    assert f"{backends.__name__}.plain_programs" not in sys.modules
    recipe = Recipe(model="tiny", backends=(NAME,))
    recipe.check("cpu")
    assert recipe.backends_for("bf16") == (NAME,)
    assert "numpy" in engine_packages()


def test_it_is_built_verified_and_served(file: Path, stage: Stage, tmp_path: Path) -> None:
    exported = export_stage(stage, NAME, EngineStore(tmp_path))
    assert exported.built
    assert exported.manifest.verified
    assert {NAME, "torch"} == exported.manifest.latency_ms.keys()
    assert not export_stage(stage, NAME, EngineStore(tmp_path)).built
    runtime, inputs = Runtime({"shifted": stage}, NAME, tmp_path, strict=True), stage.cases()["sample"].inputs
    assert runtime.plan["shifted"].backend == NAME
    for value in (1.0, -3.0):
        stage.networks[0].live["shift"].fill_(value)
        torch.testing.assert_close(runtime.run("shifted", inputs)["y"], stage.torch(inputs)["y"])
    with pytest.raises(InputError, match=r"input x is torch\.float64, the engine requires torch\.float32"):
        runtime.run("shifted", {"x": inputs["x"].double()})


def test_auto_and_the_plan_know_it(file: Path, stage: Stage, tmp_path: Path) -> None:
    export_stage(stage, NAME, EngineStore(tmp_path))
    runtime = Runtime({"shifted": stage}, "auto", tmp_path)
    assert NAME in runtime.plan["shifted"].reason or runtime.plan["shifted"].backend == NAME
    (gain,) = stage_gains(runtime)
    assert [candidate.ms is not None for candidate in gain.candidates if candidate.backend == NAME] == [True]


def test_engines_and_receipts_follow_its_code(file: Path, stage: Stage) -> None:
    recipe = Recipe(model="tiny", backends=(NAME,))

    def keys() -> tuple[str, str]:
        key = stage_key(stage, NAME, "fp32", "0" * 64)
        return key, receipt_key(recipe, BuildOptions(), "cpu", {})

    before = keys()
    file.write_text(SOURCE + "# a comment\n")
    assert keys() == before
    file.write_text(SOURCE + "TAU = 6.28\n")
    assert all(now != then for now, then in zip(keys(), before, strict=True))


@pytest.mark.parametrize("content", ["", SOURCE + "class Another(PlainPrograms): pass\n"])
def test_a_file_of_none_or_two_is_a_mistake(content: str, file: Path) -> None:
    file.write_text(content)
    with pytest.raises(TypeError, match=r"plain_programs must define one subclass of Backend, but defines (0|2)"):
        get_backend(NAME)


def test_no_other_file_names_a_backend() -> None:
    """Check that no other file names a package of a backend either: such facts are attributes of the backend."""
    known = {*NAMES, *engine_packages()} - {"torch"}
    modules = {name.replace("-", "_") for name in known}
    named = []
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "runtime" / "backends"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            words: set[str] = set()
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = {node.value} & known
            elif isinstance(node, ast.ImportFrom):
                words = {*(node.module or "").split("."), *(alias.name for alias in node.names)} & modules
            elif isinstance(node, ast.Import):
                words = {part for alias in node.names for part in alias.name.split(".")} & modules
            named += [f"{path.relative_to(PACKAGE)} names {word}" for word in words]
    assert named == []


@pytest.mark.parametrize("name", NAMES)
def test_what_it_advises_to_install_brings_its_packages(name: str) -> None:
    backend, project = get_backend(name), tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    advice = re.fullmatch(r"pip install (?:'frostline\[(?P<extra>.+)\]'|(?P<package>.+))", backend.install)
    if advice is None:
        assert name == "aotinductor", "torch is installed, and no pip package contains a compiler"
        return
    extra = advice["extra"]
    required = project["optional-dependencies"][extra] if extra else project["dependencies"]
    assert {re.split("[<>=]", requirement)[0] for requirement in required} & {*backend.packages}
