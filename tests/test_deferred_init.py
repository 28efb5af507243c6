"""`deferred_init` changes when the `__init__` files of a package run, and nothing else."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from types import ModuleType

import pytest

from frostline.deferred_init import deferred_init

# Like diffsynth: `__init__` files that import the whole package, and modules that import from other subpackages.
FILES = {
    "__init__.py": "import builtins\nbuiltins.package_runs += ['large']\nfrom .core import *\nVERSION = 1",
    "core/__init__.py": "builtins = __import__('builtins')\nbuiltins.package_runs += ['core']\n"
    "from .light import *\nfrom . import heavy\nfrom .heavy import Heavy",
    "core/light/__init__.py": "from .functions import double",
    "core/light/functions.py": "def double(x):\n    return 2 * x",
    "core/heavy.py": "from .light import double\nfrom ..models.network import Network\nclass Heavy(Network):\n    pass",
    "models/network.py": "from ..core.light import double\n"
    "class Network:\n    def run(self):\n        return double(21)",
    "models/whole.py": "from .. import VERSION, Heavy\nfrom ..core import double\nfrom .network import Network",
}


@pytest.fixture
def package_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Create the package `large`; return a list that gets the names of the `__init__` files that have run."""
    for name, text in FILES.items():
        path = tmp_path / "large" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    runs: list[str] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.package_runs", runs, raising=False)
    finders = [*sys.meta_path]
    yield runs
    assert sys.meta_path == finders
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "large"]:
        del sys.modules[name]


def _network() -> type:
    with deferred_init("large"):
        from large.models.network import Network
    return Network


def _check_whole(network: type) -> None:
    """Check that the package is complete, and that each module and class exists once."""
    large = importlib.import_module("large")
    assert (large.VERSION, large.core.heavy.Heavy, large.double(1)) == (1, large.Heavy, 2)
    assert issubclass(large.Heavy, network)
    for name, module in sys.modules.items():
        parent, _, child = name.rpartition(".")
        if parent.partition(".")[0] == "large":
            assert getattr(sys.modules[parent], child) is module
        if name.partition(".")[0] == "large":
            assert type(module) is ModuleType


def test_init_files_run_when_a_name_of_theirs_is_asked_for(package_runs: list[str]) -> None:
    network = _network()
    assert (network().run(), network.__module__, package_runs) == (42, "large.models.network", [])
    import large

    assert (large.__file__, large.__name__, large.__spec__.name) == (large.core.__path__[0][:-4] + "__init__.py",) + (
        "large",
    ) * 2
    assert package_runs == []
    assert large.VERSION == 1
    assert package_runs == ["large", "core"]
    _check_whole(network)
    assert package_runs == ["large", "core"]
    importlib.reload(large)
    assert package_runs == ["large", "core", "large"]


@pytest.mark.parametrize(
    "statement",
    [
        "import large; large.VERSION",
        "from large import VERSION",
        "from large import Heavy",
        "from large import *; VERSION, Heavy, double",
        "from large.core import *; Heavy",
        "from large.core.heavy import Heavy",
        "import large.models.whole as whole; whole.Heavy, whole.VERSION",
        "import large; assert {'VERSION', 'Heavy', 'core', 'double'} <= {*dir(large)}",
        "import large; assert not hasattr(large, 'absent') and large.__dict__['VERSION'] == 1",
    ],
)
def test_a_later_import_finds_everything(package_runs: list[str], statement: str) -> None:
    network = _network()
    exec(statement, {})
    _check_whole(network)
    assert sorted(package_runs) == ["core", "large"]


def test_any_order_of_imports_gives_one_copy(package_runs: list[str]) -> None:
    names = ("large", "large.core", "large.core.heavy", "large.models.whole")
    for order in permutations((None, *names)):
        _forget()
        modules = [importlib.import_module(name) if name else _network() for name in order]
        network = _network()
        _check_whole(network)
        for name, module in zip(order, modules, strict=True):
            assert module is (sys.modules[name] if name else network)


def test_a_package_that_is_there_is_used(package_runs: list[str]) -> None:
    import large

    network = _network()
    assert (sys.modules["large"], type(large), package_runs) == (large, ModuleType, ["large", "core"])
    _check_whole(network)


def test_threads_import_one_copy(package_runs: list[str]) -> None:
    def do(action: Callable[[], object]) -> object:
        return action()

    def statement(text: str) -> Callable[[], object]:
        return lambda: exec(text, {})

    texts = ("from large import Heavy", "from large.core import *; Heavy", "from large.models.whole import Heavy")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            _forget()
            package_runs.clear()
            actions = [_network, *map(statement, texts)] * 2
            with ThreadPoolExecutor(len(actions)) as pool:
                networks = {each for each in pool.map(do, actions) if each}
            assert len(networks) == 1
            _check_whole(networks.pop())
            assert sorted(package_runs) == ["core", "large"]
    finally:
        sys.setswitchinterval(interval)


def test_an_init_file_that_fails_says_so_and_is_run_again(package_runs: list[str], tmp_path: Path) -> None:
    file = tmp_path / "large" / "core" / "__init__.py"
    text = file.read_text()
    file.write_text("import nothing_of_this_name")
    network = _network()
    import large

    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
            _ = large.VERSION
    file.write_text(text)
    importlib.invalidate_caches()
    _check_whole(network)


def test_another_layout_is_imported_as_usual(package_runs: list[str], tmp_path: Path) -> None:
    with deferred_init("large"), pytest.raises(ModuleNotFoundError, match=r"large\.models\.gone"):
        importlib.import_module("large.models.gone")
    _forget()
    (tmp_path / "large" / "__init__.py").write_text("import sys\nsys.modules[__name__] = sys")
    with deferred_init("large"):
        large = importlib.import_module("large")
    assert large.maxsize == sys.maxsize
    _forget()
    # Without `__init__.py` it is a namespace package; a single file is a module.
    for name in ("__init__.py", "core/__init__.py"):
        (tmp_path / "large" / name).unlink()
    importlib.invalidate_caches()
    assert _network()().run() == 42
    _forget()
    (tmp_path / "large").rename(tmp_path / "moved")
    (tmp_path / "large.py").write_text("VERSION = 2")
    importlib.invalidate_caches()
    with deferred_init("large"):
        assert importlib.import_module("large").VERSION == 2


# Runs in a separate process, because it checks what is imported there.
DIFFSYNTH = """
import copy, inspect, pickle, sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
import torch

from frostline.models.checkpoints.loading import load_components
from frostline.runtime.identity.computation import _find, _installed, computation_id

code = ["frostline.models.checkpoints.loading", "diffsynth.models.wan_video_dit"]
before = computation_id(code)
parts = load_components("tiny")
slow = {"pandas", "modelscope", "torchvision", "torch._inductor.compile_fx"} & {*sys.modules}
assert not slow, f"loading a model imports {slow}"

network = parts.denoiser.blocks[0].norm3
kind = type(parts.denoiser)
assert kind.__module__ == "diffsynth.models.wan_video_dit"
assert inspect.getsource(kind).startswith("class WanModel")
assert type(pickle.loads(pickle.dumps(parts.denoiser))) is kind is type(copy.deepcopy(parts.denoiser))
x = torch.randn(2, 3, 128)
gate = parts.denoiser.blocks[0].self_attn.norm_q
assert torch.equal(torch.export.export(gate, (x,)).module()(x), gate(x))
assert torch.equal(torch.compile(gate, backend="eager")(x), gate(x))
_find.cache_clear(), _installed.cache_clear()
assert computation_id(code) == before
assert type(sys.modules["diffsynth"]) is not ModuleType

statements = (
    "from diffsynth import ModelConfig",
    "import diffsynth.pipelines.wan_video",
    "import diffsynth.core as core; core.load_model",
)
with ThreadPoolExecutor(3) as pool:
    list(pool.map(lambda text: exec(text, {}), statements))
import diffsynth
from diffsynth.pipelines.wan_video import WanVideoPipeline, model_fn_wan_video
assert diffsynth.models.wan_video_dit.WanModel is kind is model_fn_wan_video.__globals__["WanModel"]
for name, module in [*sys.modules.items()]:
    if name.partition(".")[0] == "diffsynth":
        assert type(module) is ModuleType, name
        parent, _, child = name.rpartition(".")
        # `from .attention import *` gives diffsynth.core the module of this name within diffsynth.core.attention.
        assert not parent or sys.modules.get(getattr(sys.modules[parent], child).__name__), name
assert isinstance(load_components("tiny").denoiser, kind)
"""


def test_diffsynths_classes_are_the_packages_own() -> None:
    result = subprocess.run([sys.executable, "-c", DIFFSYNTH], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
