"""The code of a computation: found by reading sources, and identified by what it does and by package versions."""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import frostline
from frostline.runtime.identity import computation
from frostline.runtime.identity.computation import computation_id

PACKAGE = Path(frostline.__file__).parent
Write = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def _fresh_search() -> Iterator[None]:
    """Clear the caches of module locations, because these tests add other modules."""
    caches = (computation._find, computation._installed, computation._warn_unreadable)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write("mine/model.py", source)`: write a module into a folder in which Python finds modules; return its path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    return write


@pytest.fixture
def mine(write: Write) -> Write:
    write("mine/__init__.py", "from mine import unused")
    write("mine/unused.py", "x = 1")
    write("mine/scale.py", "SCALE = 2.0")
    write("mine/types.py", "class T: pass")
    write(
        "mine/model.py",
        """
        from __future__ import annotations
        from typing import TYPE_CHECKING
        import math
        if TYPE_CHECKING:
            from mine.types import T

        def run(x: T):
            from .scale import SCALE
            return math.sqrt(x) * SCALE
        """,
    )
    return write


def test_what_a_module_imports_counts_and_nothing_else(mine: Write) -> None:
    first = computation_id(["mine.model"])
    assert len(first) == 64
    mine("mine/scale.py", "# twice\nSCALE: float = (2.0)\n'''How much.'''\n")
    mine("mine/types.py", "class T: x = 1")
    mine("mine/unused.py", "x = 2")
    assert computation_id(["mine.model"]) == computation_id(iter(["mine.model", "mine.model"])) == first
    mine("mine/scale.py", "SCALE = 2.5")
    assert computation_id(["mine.model"]) != first


def test_the_folder_does_not_count(mine: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = computation_id(["mine.model"])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine").rename(tmp_path / "elsewhere" / "mine")
    computation._find.cache_clear()
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    assert computation_id(["mine.model"]) == first


def test_circles_end(write: Write) -> None:
    write("one.py", "import two")
    write("two.py", "import one")
    assert computation_id(["one"]) == computation_id(["one", "two"])


def install(write: Write, version: str, *, record: bool = True, constant: int = 1) -> None:
    write("site-packages/oracle/__init__.py", f"ANSWER = {constant}")
    write(
        "site-packages/the_oracle-1.dist-info/METADATA",
        f"Metadata-Version: 2.1\nName: the-oracle\nVersion: {version}\n",
    )
    write("site-packages/the_oracle-1.dist-info/RECORD", "oracle/__init__.py,,\n" if record else "")


def test_installed_packages_count_by_version(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("user.py", "def f():\n    import oracle.deep.inside")
    absent = computation_id(["user"])
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    seen = [absent]
    for version in ("1.0", "1.1"):
        install(write, version)
        computation._installed.cache_clear()
        computation._find.cache_clear()
        seen.append(computation_id(["user"]))
    assert len({*seen}) == 3
    install(write, "1.1", constant=2)
    assert computation_id(["user"]) == seen[-1]
    assert computation_id(["user"], source_of=["oracle"]) != seen[-1]


@pytest.mark.parametrize("module", ["frostline.models.checkpoints.loading", "frostline.models.wan.vae_chunks"])
def test_what_uses_diffsynths_classes_counts_its_version(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = computation_id([module])
    installed = computation._installed
    monkeypatch.setattr(computation, "_installed", lambda top: "another" if top == "diffsynth" else installed(top))
    assert computation_id([module]) != first


def test_a_package_that_is_being_developed_counts_by_its_source(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use its source, because the version of an editable install stays the same for months."""
    write("own/__init__.py", "X = 1")
    write("own.egg-info/PKG-INFO", "Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    first = computation_id(["own"])
    write("own/__init__.py", "X = 2")
    assert computation_id(["own"]) != first


def test_extension_modules_and_other_pythons_count_by_their_bytes(write: Write) -> None:
    path = write("old.py", "print 'x'")
    first = computation_id(["old"])
    path.write_text("print 'y'")
    assert computation_id(["old"]) != first


def test_code_without_a_source_is_good_for_one_process(caplog: pytest.LogCaptureFixture) -> None:
    code = "import sys, types; sys.modules['typed_in'] = types.ModuleType('typed_in')\n"
    code += "from frostline.runtime.identity.computation import computation_id as id\n"
    code += "print(id(['typed_in']) == id(['typed_in']), id(['typed_in']))"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    (one, first), (two, second) = (run.stdout.split() for run in runs)
    assert (one, two) == ("True", "True")
    assert first != second
    assert runs[0].stderr.count("cannot read the source of module typed_in") == 1


def test_a_script_counts_by_its_file(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    seen = []
    for constant in (1, 1, 2):
        body = f"from frostline.runtime.identity.computation import computation_id\nX = {constant}\n"
        script.write_text(body + "print(computation_id(['__main__']))")
        run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
        seen.append(run.stdout)
    assert seen[0] == seen[1] != seen[2]


def test_asking_imports_neither_torch_nor_what_is_asked_for() -> None:
    code = "import sys; from frostline.runtime.identity.computation import computation_id\n"
    code += "computation_id(['frostline.export.model', 'frostline.export.tracing.onnx'])\n"
    code += "assert not {'torch', 'diffsynth', 'frostline.export', 'frostline.models'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_backend_counts_with_all_its_own_files_and_not_with_what_all_share(monkeypatch: pytest.MonkeyPatch) -> None:
    followed, read = set[str](), computation._read

    def reading(name: str) -> tuple[str, tuple[computation.Import, ...]]:
        followed.add(name)
        return read(name)

    monkeypatch.setattr(computation, "_read", reading)
    backends = "frostline.runtime.backends"
    computation_id([f"{backends}.tensorrt_rtx"])
    assert followed >= {f"{backends}.tensorrt_rtx", f"{backends}.tensorrt.backend", f"{backends}.tensorrt.builder"}
    assert f"{backends}.tensorrt" not in followed, "this module is another backend"
    assert not [name for name in followed if name.startswith((f"{backends}.base", "frostline.runtime.stage"))]


def test_what_is_left_out_is_there_and_what_computes_is_not_left_out() -> None:
    """Check the list `computation._PLUMBING`: if a file is renamed, it must not be included or left out by accident."""
    for name in computation._PLUMBING:
        path = PACKAGE.parent.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
    files = [path.relative_to(PACKAGE.parent).with_suffix("") for path in (PACKAGE / "models").rglob("*.py")]
    plumbing = {".".join(file.parts) for file in files if computation._is_plumbing(".".join(file.parts))}
    assert all(name.startswith("frostline.models.tiny.") for name in plumbing)
