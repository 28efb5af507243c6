"""The class that an entry of `rewards` names: found in its source without running it, and imported for a run."""

import sys
from pathlib import Path

import pytest

from frostline.errors import ConfigError
from frostline.rewards.reward_class import import_reward, look_for_reward

# Each of these modules writes a file when it is run.
TRACE = "open({trace!r}, 'a').close()\n"
FILES = {
    "package/__init__.py": "from .inner import Reward as Again\n",
    "package/inner/__init__.py": "class Reward:\n    class Nested: ...\n",
    "package/inner/reward.py": "if True:\n    class Reward: ...\nelse:\n    Other = 1\ndef function(): Local = 1\n",
    "package/star.py": "from package.inner.reward import *\n",
    "package/lazy.py": "def __getattr__(name): return type(name, (), {})\n",
    "package/made.py": "Reward: type = type('Reward', (), {})\nA, (B, *C) = 1, (2, 3)\n",
    "package/broken.py": "class Reward:\n",
    "package/deep.py": "x = " + "(" * 9999 + "\n",
    "bare/reward.py": "class Reward: ...\n",
}


@pytest.fixture(autouse=True)
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a file that exists as soon as any of the modules was run."""
    for name, source in FILES.items():
        path = tmp_path / "modules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TRACE.format(trace=str(tmp_path / "trace")) + source)
    (tmp_path / "modules" / "package" / "bytes.py").write_bytes(b"\xff\0")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield tmp_path / "trace"
    for name in [name for name in sys.modules if name.partition(".")[0] in ("package", "bare")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "path",
    [
        "frostline.rewards.sharpness:SharpnessReward",
        "package:Again",
        "package.inner:Reward",
        "package.inner.reward:Reward",
        "package.inner.reward:Other",  # only running it would show that this is not a class
        "package.star:Reward",
        "package.lazy:Reward",
        "package.made:Reward",
        "package.made:C",
        "bare.reward:Reward",
        "sys:Reward",  # it has no source
    ],
)
def test_what_may_be_there_is_found_without_running_it(path: str, trace: Path) -> None:
    before = set(sys.modules)
    look_for_reward(path, "rewards.0")
    assert not trace.exists()
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere:Reward", "nowhere cannot be imported: there is no such module"),
        ("nowhere.deep:Reward", "nowhere.deep cannot be imported: there is no such module"),
        ("package.nowhere:Reward", "package.nowhere cannot be imported: there is no such module"),
        ("package.inner.reward.deep:Reward", "cannot be imported: there is no such module"),
        ("sys.deep:Reward", "cannot be imported: there is no such module"),
        ("__main__:Reward", "__main__ "),
        ("package.inner:Nested", "package.inner has no class 'Nested'"),
        ("package.inner.reward:Local", "has no class 'Local'"),
        ("package.inner.reward:function", "has no class 'function'"),
        ("package.broken:Reward", "package.broken cannot be imported: expected an indented block"),
        ("package.deep:Reward", "package.deep cannot be imported: "),
        ("package.bytes:Reward", "package.bytes cannot be imported: "),
        ("bare:Reward", "bare has no class 'Reward'"),
        ("package", "must be package.module:Class"),
        ("package.:Reward", "must be package.module:Class"),
        ("package:Reward()", "must be package.module:Class"),
    ],
)
def test_what_is_not_there_is_refused_without_running_anything(path: str, said: str, trace: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        look_for_reward(path, "rewards.0")
    assert said in str(caught.value)
    assert not trace.exists()


def test_a_run_imports_it(trace: Path) -> None:
    assert import_reward("package.inner.reward:Reward", "rewards.0").__module__ == "package.inner.reward"
    assert trace.exists()
    for path in ("package.inner.reward:Other", "package.inner.reward:function"):
        with pytest.raises(ConfigError, match="has no class"):
            import_reward(path, "rewards.0")
