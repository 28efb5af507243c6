"""What all tests share: threads that get along, a signing key of their own, tiny's engines, training modules.

The engines of a whole session are built once, in `engines` and `variant_engines`; tests must not change them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Read by OpenMP as torch starts: threads that spin while they wait take the cores from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from torch import Tensor

    from frostline.models.faces import Detections, FaceDetector
    from frostline.train.module import WanTrainingModule

MakeModule = Callable[..., "WanTrainingModule"]

SETTINGS: dict[str, Any] = {"lora": {"rank": 8}, "kl_weight": 0.1}


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Tiny tensors gain nothing from many threads."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def session_signing_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The key that signs the engines of the session, wherever HOME is."""
    path = Path(os.environ["FL_DEV"]) / "key" if "FL_DEV" in os.environ else tmp_path_factory.mktemp("key") / "signing.key"  # DEV
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FROSTLINE_SIGNING_KEY_FILE", str(path))
        yield path


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
    """A training module whose LoRA is random, so that it has a policy of its own; `lora_spread=0` leaves it as new.

    All variants go by the name `tiny` in the engine store: keys depend on content, so what they share is found.
    """
    import torch

    from frostline.config import TrainingModuleSettings
    from frostline.models.loading import load_components
    from frostline.train.module import WanTrainingModule

    components = replace(load_components(model, dtype or torch.float32), name="tiny")
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
def engines(tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path) -> Path:
    """A store with ONNX Runtime engines of all stages of tiny."""
    if "FL_DEV" in os.environ: return _export(Path(os.environ["FL_DEV"]) / "engines2", "tiny")  # DEV
    return _export(tmp_path_factory.mktemp("engines"), "tiny")


@pytest.fixture(scope="session")
def variant_engines(engines: Path) -> Path:
    """The same store, with what tiny-moe and tiny-ti2v need beside."""
    return _export(engines, "tiny-moe", "tiny-ti2v")


def _export(root: Path, *models: str) -> Path:
    from frostline.export.exporter import export_stage
    from frostline.runtime.store import EngineStore

    for model in models:
        for stage in build_module(model).stages.values():
            export_stage(stage, "onnxruntime", EngineStore(root))
    return root


class PixelTape:
    """The 8-bit pixels in which faces were searched, kept from one step and given to the detector in another.

    Rounding to 8 bits makes 1/255 out of a difference of 1e-7 wherever a pixel lies on the edge, which moves
    landmarks by 1e-3 pixels and, where MTCNN rounds a box, by more. Two ways of computing a step can be held against
    each other to 1e-5 only on equal pixels; that their own are equal but for the roundings is asserted here.
    """

    def __init__(self) -> None:
        self.pixels: list[Tensor] = []

    @contextmanager
    def record(self, module: "WanTrainingModule") -> Iterator[None]:
        """Keep the pixels of the searches that `module` makes within the block."""

        def keep(frames: "Tensor") -> "Tensor":
            self.pixels.append(frames)
            return frames

        with _searching(module, keep):
            yield

    @contextmanager
    def replay(self, module: "WanTrainingModule", frames: slice = slice(None)) -> Iterator[None]:
        """Let `module` search the recorded pixels (those `frames` of each search), which must be its own but for rounding."""
        tape = iter(self.pixels)

        def exchange(own: "Tensor") -> "Tensor":
            recorded = next(tape)[frames]
            assert_equal_but_for_rounding(own, recorded)
            return recorded

        with _searching(module, exchange):
            yield
        assert next(tape, None) is None, "a recorded search was not made"


def assert_equal_but_for_rounding(pixels: "Tensor", others: "Tensor") -> None:
    """Both 0 to 255: at most one pixel in a thousand is off, and by no more than one step."""
    difference = (pixels.float() - others.float()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


@contextmanager
def _searching(module: "WanTrainingModule", seen: "Callable[[Tensor], Tensor]") -> Iterator[None]:
    identity = module.reward.identity
    own = identity.detector
    identity.detector = _Detector(own, seen)
    try:
        yield
    finally:
        identity.detector = own


class _Detector:
    def __init__(self, detector: "FaceDetector", seen: "Callable[[Tensor], Tensor]") -> None:
        self.detector = detector
        self.seen = seen

    def detect(self, frames: "Tensor", upscale: int = 1) -> "Detections":
        return self.detector.detect(self.seen(frames), upscale)


@pytest.fixture
def tape() -> PixelTape:
    return PixelTape()
