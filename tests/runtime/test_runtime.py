"""The runtime: plans, swapping of backends, and failures of engines."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from frostline.errors import ConfigError, EngineError
from frostline.export.exporter import export_stage
from frostline.export.plan_estimate import stage_gains
from frostline.runtime.backends.onnxruntime import OnnxRuntimeRunner
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.manifest import Manifest
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import Network, Stage, TensorSpec
from frostline.train import WanTrainingModule

ORT = "onnxruntime"


@pytest.fixture(autouse=True)
def signing_key(session_signing_key: Path) -> Path:
    """Use one key for all tests, because the engines are used by several tests."""
    return session_signing_key


class Affine(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + 1


def affine_stage(name: str, seed: int) -> Stage:
    """Return a stage that computes `y = x W + 1` for x of 1 to 8 rows."""
    network = Network(name, Affine(seed), (TensorSpec("x", (Dimension("rows", 1, 4, 8), 3)),), ("y",))

    tolerance = Tolerance(atol=1e-5, rtol=0, cosine=0.999)
    return Stage(name=name, model="toy", networks=(network,), tolerance=tolerance)


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return {"first": affine_stage("first", 1), "second": affine_stage("second", 2)}


@pytest.fixture(scope="module")
def built(stages: dict[str, Stage], tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path) -> Path:
    """Return a store with an engine of `first`, and none of `second`."""
    root = tmp_path_factory.mktemp("toy-engines")
    export_stage(stages["first"], ORT, EngineStore(root))
    return root


@pytest.fixture
def rewrite(built: Path) -> Iterator[Callable[..., None]]:
    """Yield a function that changes measurements in the engine's signed manifest; restore them afterwards."""
    store = EngineStore(built)

    def change(**changes: object) -> None:
        (record,) = store.find()
        engine = store.verify(record)
        store.update(engine, engine.manifest.updated(**changes))

    before = manifest_of(built)
    yield change
    change(latency_ms=before.latency_ms, verified=before.verified)


def manifest_of(root: Path) -> Manifest:
    (record,) = EngineStore(root).find()
    assert record.manifest is not None
    return record.manifest


def rows(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def expected(stages: dict[str, Stage], name: str, x: Tensor) -> Tensor:
    return stages[name].torch({"x": x})["y"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("frostline")]


def test_the_plan_prints_as_a_table(stages: dict[str, Stage], built: Path) -> None:
    plan = Runtime(stages, {"first": ORT, "*": "torch"}, built).plan
    assert {name: choice.backend for name, choice in plan.items()} == {"first": ORT, "second": "torch"}
    header, first, second = str(plan).splitlines()
    assert header.split() == ["stage", "backend", "ms", "torch", "ms", "reason"]
    latency = manifest_of(built).latency_ms
    assert first.split()[:4] == ["first", ORT, f"{latency[ORT]:.2f}", f"{latency['torch']:.2f}"]
    assert second.split() == ["second", "torch", "-", "-", "as", "requested"]


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_a_stage_runs_on_its_backend(name: str, count: int, stages: dict[str, Stage], built: Path) -> None:
    runtime = Runtime(stages, {"first": ORT, "second": "torch"}, built, strict=True)
    x = rows(count)
    with runtime.clock.collect() as times:
        torch.testing.assert_close(runtime[name](x=x)["y"], expected(stages, name, x), atol=1e-6, rtol=0)
    (time,) = times.read().values()
    assert (time.backend, time.calls) == (ORT if name == "first" else "torch", 1)
    assert time.milliseconds > 0


def test_without_a_store_torch_serves_everything(stages: dict[str, Stage]) -> None:
    plan = Runtime(stages).plan
    assert {choice.backend for choice in plan.values()} == {"torch"}
    assert len(plan) == 2


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("onnx", "unknown backend 'onnx': use one of torch, onnxruntime"),
        ({"first": "onnx"}, "unknown backend 'onnx'"),
        ({"third": "torch"}, "there is no stage 'third'; valid stages: first, second"),
    ],
)
def test_unknown_names_in_a_plan(plan: str | dict[str, str], message: str, stages: dict[str, Stage]) -> None:
    with pytest.raises(ConfigError) as caught:
        Runtime(stages, plan)
    assert message in str(caught.value)


def test_unknown_names_later_on(stages: dict[str, Stage]) -> None:
    runtime = Runtime(stages)
    with pytest.raises(ConfigError, match="no stage 'third'"):
        runtime["third"]
    with pytest.raises(ConfigError, match="no stage 'third'"), runtime.use(third="torch"):
        pass
    with pytest.raises(ConfigError, match="unknown backend 'onnx'"), runtime.use(first="onnx"):
        pass
    assert {choice.backend for choice in runtime.plan.values()} == {"torch"}


def test_use_swaps_for_a_block_and_restores(stages: dict[str, Stage], built: Path) -> None:
    runtime = Runtime(stages, {"first": ORT, "second": "torch"}, built)
    stage, x = runtime["first"], rows()

    def served() -> str:
        with runtime.clock.collect() as times:
            stage(x=x)
        return times.read()["first"].backend

    with runtime.use(first="torch"):
        assert runtime.plan["first"].backend == "torch"
        assert served() == "torch"
        with runtime.use(first=ORT):
            assert served() == ORT
        assert runtime.plan["first"].backend == "torch"
    assert runtime.plan["first"].backend == ORT
    with pytest.raises(RuntimeError, match="on the way"), runtime.use(first="torch"):
        raise RuntimeError("on the way")
    assert runtime.plan["first"].backend == ORT
    assert served() == ORT


def test_a_missing_engine_is_said_once_with_what_to_type(
    stages: dict[str, Stage], built: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(stages, ORT, built)
    assert {name: choice.backend for name, choice in runtime.plan.items()} == {"first": ORT, "second": "torch"}
    (message,) = warnings(caplog)
    assert "no engine of second for onnxruntime" in message
    assert "--stages second --backend onnxruntime" in message
    runtime["second"](x=rows())
    assert len(warnings(caplog)) == 1
    with pytest.raises(EngineError, match="no engine of second for onnxruntime"):
        Runtime(stages, ORT, built, strict=True)


@pytest.fixture
def corrupted(built: Path) -> Iterator[Path]:
    """Return the store while one byte of the engine's file is wrong."""
    (path,) = built.rglob("*.onnx")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    yield built
    path.write_bytes(content)


def test_a_corrupted_engine_falls_back_with_one_warning(
    stages: dict[str, Stage], corrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(stages, {"first": ORT, "second": "torch"}, corrupted)
    x = rows()
    for _ in range(3):
        assert torch.equal(runtime["first"](x=x)["y"], expected(stages, "first", x))
    (message,) = warnings(caplog)
    assert "stage first" in message
    assert "backend onnxruntime" in message
    assert "the hash of" in message
    assert runtime.plan["first"].backend == "torch"
    assert "onnxruntime failed" in runtime.plan["first"].reason


def test_a_corrupted_engine_is_in_no_table_of_what_serves(stages: dict[str, Stage], corrupted: Path) -> None:
    runtime = Runtime(stages, {"first": ORT, "second": "torch"}, corrupted)
    gain = next(gain for gain in stage_gains(runtime) if gain.stage == "first")
    assert gain.choice.backend == "torch" and "is refused: the hash of" in gain.choice.reason
    (candidate,) = (candidate for candidate in gain.candidates if candidate.bytes)
    assert (candidate.backend, candidate.note) == (ORT, "refused")
    assert runtime.check_engines() == set()


def test_a_corrupted_engine_raises_when_strict(stages: dict[str, Stage], corrupted: Path) -> None:
    runtime = Runtime(stages, {"first": ORT, "second": "torch"}, corrupted, strict=True)
    with pytest.raises(EngineError, match="is refused: the hash of"):
        runtime["first"](x=rows())


def test_an_engine_that_fails_at_run_falls_back_with_one_warning(
    stages: dict[str, Stage], built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_memory(self: OnnxRuntimeRunner, **inputs: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("out of memory")

    x = rows()
    runtime, strict = (Runtime(stages, {"first": ORT, "second": "torch"}, built, strict=s) for s in (False, True))
    runtime["first"](x=x)
    monkeypatch.setattr(OnnxRuntimeRunner, "__call__", out_of_memory)
    for _ in range(3):
        assert torch.equal(runtime["first"](x=x)["y"], expected(stages, "first", x))
    (message,) = warnings(caplog)
    for part in ("stage first", "backend onnxruntime", "out of memory"):
        assert part in message
    with pytest.raises(RuntimeError, match="out of memory"):
        strict["first"](x=x)


def test_torch_itself_never_falls_back(stages: dict[str, Stage], caplog: pytest.LogCaptureFixture) -> None:
    runtime = Runtime(stages)
    with pytest.raises(RuntimeError):
        runtime["first"](x=torch.zeros(2, 5))
    assert warnings(caplog) == []


def test_a_shape_beyond_the_engine_is_served_by_torch_this_once(
    stages: dict[str, Stage], built: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(stages, {"first": ORT, "second": "torch"}, built)
    for _ in range(2):
        x = rows(9)
        assert torch.equal(runtime["first"](x=x)["y"], expected(stages, "first", x))
    (message,) = warnings(caplog)
    assert "(9, 3)" in message
    assert runtime.plan["first"].backend == ORT
    with pytest.raises(EngineError, match=r"\(9, 3\)"):
        Runtime(stages, {"first": ORT, "second": "torch"}, built, strict=True)["first"](x=rows(9))


@pytest.mark.parametrize("backend", [ORT, "torch"])
def test_the_networks_of_a_stage_run_on_its_backend(backend: str, stages: dict[str, Stage], built: Path) -> None:
    runtime = Runtime(stages, {"first": backend, "second": "torch"}, built, strict=True)
    x = rows()
    with runtime.clock.collect() as times:
        serving, networks = runtime.networks_at("first", {"x": x})
        assert (serving, [*networks]) == (backend, ["first"])
        torch.testing.assert_close(networks["first"](x=x)["y"], expected(stages, "first", x), atol=1e-6, rtol=0)
    assert times.read() == {}


def test_networks_whose_engine_fails_are_served_by_torch_with_one_warning(
    stages: dict[str, Stage], built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail(self: OnnxRuntimeRunner, **inputs: Tensor) -> dict[str, Tensor]:
        calls.append(inputs)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(OnnxRuntimeRunner, "__call__", fail)
    runtime, strict = (Runtime(stages, {"first": ORT, "second": "torch"}, built, strict=s) for s in (False, True))
    _, networks = runtime.networks_at("first", {"x": rows()})
    for seed in (1, 2):
        x = rows(seed=seed)
        assert torch.equal(networks["first"](x=x)["y"], expected(stages, "first", x))
    assert len(calls) == 1
    (message,) = warnings(caplog)
    assert "using torch from now on (out of memory)" in message
    assert runtime.networks_at("first", {"x": rows()})[0] == "torch"
    with pytest.raises(RuntimeError, match="out of memory"):
        strict.networks_at("first", {"x": rows()})[1]["first"](x=rows())


def test_networks_whose_engine_cannot_be_loaded_are_served_by_torch(
    stages: dict[str, Stage], corrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(stages, {"first": ORT, "second": "torch"}, corrupted)
    _, networks = runtime.networks_at("first", {"x": rows()})
    assert torch.equal(networks["first"](x=rows())["y"], expected(stages, "first", rows()))
    (message,) = warnings(caplog)
    assert "the hash of" in message


@pytest.mark.parametrize("backend", [ORT, "torch"])
def test_outputs_belong_to_the_caller(backend: str, stages: dict[str, Stage], built: Path) -> None:
    runtime = Runtime(stages, {"first": backend, "second": "torch"}, built, strict=True)
    first = runtime["first"](x=rows(seed=1))["y"]
    kept = first.clone()
    second = runtime["first"](x=rows(seed=2))["y"]
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    first.zero_()
    assert torch.equal(runtime["first"](x=rows(seed=1))["y"], kept)
    assert not first.requires_grad


def test_inputs_are_left_alone_whatever_their_strides(stages: dict[str, Stage], built: Path) -> None:
    runtime = Runtime(stages, {"first": ORT, "second": "torch"}, built, strict=True)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).t()
    kept = x.clone()
    torch.testing.assert_close(runtime["first"](x=x)["y"], expected(stages, "first", x), atol=1e-6, rtol=0)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("latency_ms", "verified", "chosen", "reason"),
    [
        ({"torch": 2.0, ORT: 1.0}, True, ORT, "2.00x as fast as torch"),
        ({"torch": 1.0, ORT: 2.0}, True, "torch", "onnxruntime is slower (0.50x)"),
        ({"torch": 1.0, ORT: 1.0}, True, "torch", "onnxruntime is slower (1.00x)"),
        ({"torch": 1.04, ORT: 1.0}, True, "torch", "onnxruntime is hardly faster (1.04x)"),
        ({"torch": 1.06, ORT: 1.0}, True, ORT, "1.06x as fast as torch"),
        ({"torch": 2.0, ORT: 1.0}, False, "torch", "no verified engine"),
        ({ORT: 1.0}, True, "torch", "no verified engine"),
        ({}, True, "torch", "no verified engine"),
    ],
)
def test_auto_picks_what_is_verified_and_faster(
    latency_ms: dict[str, float],
    verified: bool,
    chosen: str,
    reason: str,
    stages: dict[str, Stage],
    built: Path,
    rewrite: Callable[..., None],
) -> None:
    rewrite(latency_ms=latency_ms, verified=verified)
    plan = Runtime(stages, "auto", built).plan
    assert plan["first"].backend == chosen
    assert reason in plan["first"].reason
    assert plan["second"].backend == "torch"
    assert "--stages second --backend onnxruntime" in plan["second"].reason


def test_an_unverified_engine_serves_nobody_who_asks(
    stages: dict[str, Stage], built: Path, rewrite: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(verified=False)
    runtime = Runtime(stages, {"first": ORT, "second": "torch"}, built)
    assert runtime.plan["first"].backend == "torch"
    assert "not verified" in warnings(caplog)[0]
    with pytest.raises(EngineError, match="not verified"):
        Runtime(stages, {"first": ORT, "second": "torch"}, built, strict=True)


def test_an_engine_of_other_weights_is_not_found(stages: dict[str, Stage], built: Path) -> None:
    other = {"first": affine_stage("first", 3)}
    assert Runtime(other, "auto", built).plan["first"].backend == "torch"
    assert Runtime(stages, {"first": ORT, "second": "torch"}, built).plan["first"].backend == ORT


def test_the_fingerprint_tells_weights_and_backends_apart(stages: dict[str, Stage], built: Path) -> None:
    runtime = Runtime(stages, {"first": ORT, "second": "torch"}, built)
    prints = {runtime.fingerprint("first"), runtime.fingerprint("second")}
    with runtime.use(first="torch"):
        prints.add(runtime.fingerprint("first"))
    prints.add(Runtime({"first": affine_stage("first", 3)}).fingerprint("first"))
    assert len(prints) == 4
    assert Runtime({"first": affine_stage("first", 1)}).fingerprint("first") == Runtime(stages).fingerprint("first")


def test_a_training_step_survives_a_corrupted_engine(
    make_module: Callable[..., WanTrainingModule], engines: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Run a whole step: a damaged denoiser engine costs one warning, and the step equals that of plain torch."""
    import shutil

    copy = tmp_path / "engines"
    shutil.copytree(engines, copy)
    for path in (copy / "tiny" / "denoiser").rglob("*.onnx"):
        path.write_bytes(path.read_bytes()[:-100])
    quick = {"num_inference_steps": 3, "grad_start_step": 1, "grad_end_step": 2}
    plan = {
        "denoiser": ORT,
        **dict.fromkeys(("text_encoder", "vae_encoder", "face_detector", "face_embedder"), "torch"),
    }
    module = make_module(plan=plan, engines=copy, strict=False, **quick)
    data = {"prompt": ["a person nods"], "video": torch.full((1, 5, 3, 32, 32), 0.5)}
    step = module(data)
    failures = [message for message in warnings(caplog) if "no face" not in message]
    assert len(failures) == 1
    assert "stage denoiser: backend onnxruntime failed" in failures[0]
    for one, other in zip(step, make_module(**quick)(data), strict=True):
        assert torch.equal(one, other)
