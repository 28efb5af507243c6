"""Fixtures of all tests: thread settings, a signing key, the engines of `tiny`, and training modules.

`engines` and `variant_engines` are built once in a session; tests must not change them. Sessions with the same
`FROSTLINE_TEST_FOLDER`, such as those of `make test`, share the engines.
"""

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from forked import run_python

# OpenMP reads this when torch is imported. Threads that spin for long while they wait take CPU time from other threads.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

if TYPE_CHECKING:
    from torch import Tensor

    from frostline.models.faces import Detections, FaceDetector, FaceIdentity
    from frostline.rewards.reward import RewardScore
    from frostline.runtime.engines.store import VerifiedEngine
    from frostline.train import WanTrainingModule

RefusedUsage = Callable[..., str]
MakeModule = Callable[..., "WanTrainingModule"]

_FRESH = "FROSTLINE_TEST_IN_FRESH_PROCESS"

# Not `auto`, with which every module would measure memory.
SETTINGS: dict[str, Any] = {"lora": {"rank": 8}, "kl_weight": 0.1, "gradient_checkpointing": "none"}


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Use at most two threads: more do not make operations on tiny tensors faster."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def _no_terminal() -> Iterator[None]:
    """Remove COLUMNS and LINES, so that output has the same width in every process of pytest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        patch.delenv("LINES", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _short_timings() -> Iterator[None]:
    """Shorten the latency measurement of exports, which takes a second or two; no test depends on its precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("frostline.export.exporter._LATENCY_SECONDS", 0.2)
        yield


@pytest.fixture(scope="session", autouse=True)
def _sface_read_once() -> Iterator[None]:
    """Read SFace once in a session and copy it: reading its 8-bit weights takes a third of a second."""
    from frostline.models.faces import embedders

    original = embedders.OnnxModule
    read = functools.cache(original)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            embedders,
            "OnnxModule",
            lambda path: copy.deepcopy(read(path)) if path == embedders.sface_path() else original(path),
        )
        yield


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Seed torch before each test, so that random tensors do not depend on the tests before it in the same process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of a session share: one of them builds an engine, and the others wait for it."""
    return _shared(tmp_path_factory)


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if folder := os.environ.get("FROSTLINE_TEST_FOLDER"):
        return Path(folder)
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def session_signing_key(session_folder: Path) -> Iterator[Path]:
    """The key that signs the engines of the session, independent of HOME."""
    path = session_folder / "signing.key"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FROSTLINE_SIGNING_KEY_FILE", str(path))
        yield path


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a temporary cache folder, so that tests do not write digests of weights to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests in `slow.txt` and `exhaustive.txt`; tests that use the shared engines are marked slow, too."""
    slow, exhaustive = (
        {*(config.rootpath / "tests" / name).read_text().splitlines()} for name in ("slow.txt", "exhaustive.txt")
    )
    for item in items:
        assert isinstance(item, pytest.Function)
        path = item.path.relative_to(config.rootpath).as_posix()
        if {path, f"{path}::{item.originalname}"} & slow or "shared_store" in item.fixturenames:
            item.add_marker("slow")
        if f"{path}::{item.name}" in exhaustive:
            item.add_marker("exhaustive")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test with the mark `fresh_process` in a new process: a process that forks must have one thread only."""
    if pyfuncitem.get_closest_marker("fresh_process") is None or _FRESH in os.environ:
        return None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", pyfuncitem.nodeid]
    result = run_python(*command, cwd=pyfuncitem.config.rootpath, environment={**environment, _FRESH: "1"})
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    return True


@pytest.fixture
def refused_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RefusedUsage:
    """`refused_usage("export", …)`: check that the command exits with code 2, and return its output on one line."""
    from frostline.cli import main

    def run(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["frostline", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        output = " ".join(" ".join(capsys.readouterr()).split())
        assert exit_.value.code == 2, output
        return output

    return run


def build_module(
    model: str = "tiny",
    *,
    plan: Any = "torch",
    engines: Path | None = None,
    strict: bool = True,
    lora_spread: float = 0.03,
    dtype: Any = None,
    **settings: Any,
) -> "WanTrainingModule":
    """Return a training module with a random LoRA, so that its outputs differ from those of the base model.

    All variants have the name `tiny` in the engine store: keys depend on content, so stages with equal weights use the
    same engine.

    Args:
        lora_spread: standard deviation of the LoRA matrices; 0 keeps their initial values.
    """
    import torch

    from frostline.models.checkpoints.loading import load_components
    from frostline.train import WanTrainingModule
    from frostline.train.step_settings import TrainingModuleSettings

    components = load_components(model, dtype or torch.float32)
    components = replace(components, spec=replace(components.spec, name="tiny"))
    parsed = TrainingModuleSettings.parse({**SETTINGS, **settings})
    module = WanTrainingModule(components, parsed, plan=plan, engines=engines, strict=strict)
    if lora_spread:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.trainable_parameters().values():
                parameter.copy_(lora_spread * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="session")
def make_module() -> MakeModule:
    """`make_module(model, plan=…, engines=…, lora_spread=…, **settings)`; see `build_module`."""
    return build_module


@pytest.fixture(scope="session")
def shared_store(session_folder: Path, session_signing_key: Path) -> Path:
    """The folder of the engines that tests share; tests that use it are marked slow."""
    return session_folder / "engines"


@pytest.fixture(scope="session")
def engines(shared_store: Path) -> Path:
    """A store with ONNX Runtime engines of all stages of tiny."""
    return _export(shared_store, "tiny")


@pytest.fixture(scope="session")
def variant_engines(engines: Path) -> Path:
    """The same store, with the additional engines of tiny-moe and tiny-ti2v."""
    return _export(engines, "tiny-moe", "tiny-ti2v")


@pytest.fixture(scope="session")
def expert_engines(engines: Path) -> Path:
    """The same store, with both experts of tiny-moe with LoRA inputs, and the low-noise one also without."""
    for experts in ("both", "high"):
        _export(engines, "tiny-moe", lora={"rank": 8, "experts": experts})
    return engines


@pytest.fixture(scope="session")
def small_engine(shared_store: Path) -> Callable[[str], "VerifiedEngine"]:
    """`small_engine(stage)`: the ONNX Runtime engine of a stage of `small_model`, built once."""
    from small_model import small_stages

    from frostline.export.exporter import build_stage
    from frostline.runtime.engines.store import EngineStore

    return lambda stage: build_stage(small_stages()[stage], "onnxruntime", EngineStore(shared_store))[0]


def _export(root: Path, *models: str, **settings: Any) -> Path:
    from frostline.export.exporter import export_stage
    from frostline.runtime.engines.store import EngineStore

    for model in models:
        for stage in build_module(model, **settings).stages.values():
            export_stage(stage, "onnxruntime", EngineStore(root))
    return root


class RewardTape:
    """Records the reward computation of one step, and replays it in another implementation of the same step.

    The reward is not a continuous function of the frames. Faces are detected in 8-bit pixels: where a value is close to
    a rounding boundary, a difference of 1e-7 becomes 1/255, which moves landmarks by 1e-3 pixels, or by half a pixel
    where MTCNN rounds a box. The embedder's PReLUs are not differentiable at 0: with equal landmarks, a change of the
    noise by one unit in the last place changes the pixel gradient by 2e-3, and the norm of the LoRA gradient by 1e-4.
    Two implementations of a step are therefore compared with equal pixels, and their gradients also with equal
    gradients of the frames. This class asserts that their own pixels and gradients agree up to such differences.

    Attributes:
        pixels: (B, T, 3, H, W) uint8, the input of the detector.
        frame_gradient: (B, T, 3, H, W), the gradient of the frames.
        holds_gradient: whether the replaying module uses `frame_gradient` instead of its own gradient.
    """

    pixels: "Tensor"
    frame_gradient: "Tensor"
    holds_gradient = False

    @contextmanager
    def record(self, module: "WanTrainingModule") -> Iterator[None]:
        """Record the input of the detector within the block, and the gradient of the frames when `backward` runs."""

        def see(pixels: "Tensor", frames: "Tensor") -> "Tensor":
            self.pixels = pixels.unflatten(0, frames.shape[:2])
            if frames.requires_grad:
                frames.register_hook(lambda gradient: setattr(self, "frame_gradient", gradient))
            return pixels

        with _watched(module, see):
            yield

    @contextmanager
    def replay(self, module: "WanTrainingModule", samples: slice = slice(None)) -> Iterator[None]:
        """Replace the input of the detector of `module` within the block by that recorded for `samples`."""

        def see(pixels: "Tensor", frames: "Tensor") -> "Tensor":
            recorded = self.pixels[samples].flatten(0, 1)
            assert_equal_but_for_rounding(pixels, recorded)
            frames.register_hook(lambda gradient: self.exchange(gradient, samples))
            return recorded

        with _watched(module, see):
            yield

    def exchange(self, gradient: "Tensor", samples: slice = slice(None)) -> "Tensor | None":
        """Check that `gradient` is close to the recorded one; return the latter if `holds_gradient`, else None."""
        import torch

        recorded = self.frame_gradient[samples]
        assert (gradient - recorded).norm() <= 0.02 * recorded.norm(), "the reward's gradients differ"
        assert torch.isfinite(gradient).all()
        return recorded if self.holds_gradient else None


def assert_equal_but_for_rounding(pixels: "Tensor", others: "Tensor") -> None:
    """Check that fewer than one in a thousand values (0 to 255) differ, and by at most 1."""
    difference = (pixels.float() - others.float()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


@contextmanager
def _watched(module: "WanTrainingModule", see: "Callable[[Tensor, Tensor], Tensor]") -> Iterator[None]:
    """Pass the input of the detector through `see(pixels, frames)` within the block, when frames are scored."""
    from frostline.rewards.face_identity.reward import FaceIdentityReward

    reward = module.rewards[0].reward
    assert isinstance(reward, FaceIdentityReward)
    own_score, own_identity = reward.score, reward.identity

    def score(frames: "Tensor", *others: Any) -> "RewardScore":
        def identity(run: Any) -> "FaceIdentity":
            faces = own_identity(run)
            faces.detector = _Detector(faces.detector, lambda pixels: see(pixels, frames))
            return faces

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reward, "identity", identity)
            return own_score(frames, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "score", score)
        yield


class _Detector:
    def __init__(self, detector: "FaceDetector", see: "Callable[[Tensor], Tensor]") -> None:
        self.detector = detector
        self.see = see

    def detect(self, frames: "Tensor", upscale: int = 1) -> "Detections":
        return self.detector.detect(self.see(frames), upscale)


@pytest.fixture
def tape() -> RewardTape:
    return RewardTape()
