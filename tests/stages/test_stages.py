"""The engines of tiny's stages compared with PyTorch, at shapes that were not traced; and the live LoRA."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from frostline.errors import ParityError
from frostline.export import exporter
from frostline.export.exporter import Exported, export_stage, verify_engine_parity
from frostline.models.lora.inject import lora_parameters
from frostline.models.tiny.clips import held_out_clips
from frostline.runtime.backends import onnxruntime as onnxruntime_backend
from frostline.runtime.backends.onnxruntime import OnnxRuntimeRunner
from frostline.runtime.engines.store import EngineStore, VerifiedEngine
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.identity.fingerprint import find_engine, weights_sha256
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import Network, Stage, Tensors
from frostline.stages.denoiser import REFERENCE
from frostline.stages.wan.text_encoder import TextEncoderStage
from frostline.train import WanTrainingModule

MakeModule = Callable[..., WanTrainingModule]

MODELS = ("tiny", "tiny-moe", "tiny-ti2v")
# Samples, latent frames, and height and width in pixels; no engine was traced at these values.
SHAPES = [(1, 1, 32, 48), (3, 2, 80, 64)]


@pytest.fixture(scope="module")
def modules(make_module: MakeModule, variant_engines: Path) -> dict[str, WanTrainingModule]:
    return {model: make_module(model, plan="onnxruntime", engines=variant_engines) for model in MODELS}


def at_shape(network: Network, batch: int, frames: int, height: int, width: int) -> dict[str, Tensor]:
    """Return random inputs of a network at other sizes than those of its samples."""
    extents = {"batch": batch, "latent_frames": frames, "height": height // 16, "width": width // 16}
    generator = torch.Generator().manual_seed(batch)
    inputs = {}
    for spec in (spec for spec in network.inputs if spec.name != "lora_scale"):
        shape = tuple(d if isinstance(d, int) else d.multiple * extents[d.name] for d in spec.shape)
        inputs[spec.name] = spec.random(shape, generator)
    return inputs


def assert_parity(stage: Stage, module: WanTrainingModule, inputs: dict[str, Tensor]) -> None:
    assert module.runtime.plan[stage.name].backend == "onnxruntime"
    actual = module.runtime[stage.name](**inputs)
    with torch.no_grad():
        expected = stage.torch(inputs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        bound = stage.tolerance.atol + stage.tolerance.rtol * value.abs().max().item()
        torch.testing.assert_close(actual[name], value, atol=bound, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model", MODELS)
def test_denoisers_and_text(
    model: str, shape: tuple[int, int, int, int], modules: dict[str, WanTrainingModule]
) -> None:
    module = modules[model]
    names = [name for name in module.stages if name.startswith(("denoiser", "text"))]
    assert len(names) == (3 if model == "tiny-moe" else 2)
    for name in names:
        assert_parity(module.stages[name], module, at_shape(module.stages[name].networks[0], *shape))


@pytest.mark.parametrize(("batch", "frames", "height", "width"), [(1, 1, 32, 48), (3, 5, 80, 64), (1, 17, 32, 32)])
def test_vae_encoder(batch: int, frames: int, height: int, width: int, modules: dict[str, WanTrainingModule]) -> None:
    """Encode videos of any length with the same two graphs."""
    generator = torch.Generator().manual_seed(frames)
    video = 2 * torch.rand(batch, 3, frames, height, width, generator=generator) - 1
    module = modules["tiny"]
    assert_parity(module.stages["vae_encoder"], module, {"video": video})


@pytest.mark.parametrize(("count", "frames", "size"), [(1, 1, 64), (3, 5, 112)])
def test_face_detector_and_embedder(count: int, frames: int, size: int, modules: dict[str, WanTrainingModule]) -> None:
    module = modules["tiny"]
    video = held_out_clips(count, seed=1, num_frames=frames, size=size).video
    pixels = (255 * video.flatten(0, 1)).round().to(torch.uint8)
    expected = module.stages["face_detector"].torch({"frames": pixels})
    actual = module.runtime["face_detector"](frames=pixels)
    assert len(expected["boxes"]) == count * frames
    assert torch.equal(actual["frame_index"], expected["frame_index"])
    torch.testing.assert_close(actual["landmarks"], expected["landmarks"], atol=2e-3, rtol=0)
    torch.testing.assert_close(actual["boxes"], expected["boxes"], atol=2e-3, rtol=0)
    torch.testing.assert_close(actual["probabilities"], expected["probabilities"], atol=1e-5, rtol=0)
    faces = 2 * torch.rand(count * frames, 3, 112, 112, generator=torch.Generator().manual_seed(0)) - 1
    assert_parity(module.stages["face_embedder"], module, {"faces": faces})


def test_no_face_and_no_frame(modules: dict[str, WanTrainingModule]) -> None:
    grey = torch.full((2, 3, 48, 64), 128, dtype=torch.uint8)
    for frames in (grey, grey[:0]):
        found = modules["tiny"].runtime["face_detector"](frames=frames)
        assert [len(value) for value in found.values()] == [0, 0, 0, 0]


@pytest.mark.parametrize("rank", [4, 16])
def test_one_engine_serves_every_rank_and_follows_the_trainer(
    rank: int, make_module: MakeModule, engines: Path
) -> None:
    """Use an engine that was built at rank 8: the rank is dynamic, and the matrices are in the trainer's memory."""
    built = {path for path in (engines / "tiny" / "denoiser").iterdir() if path.is_dir()}
    module = make_module(plan="onnxruntime", engines=engines, lora={"rank": rank, "alpha": 2 * rank})
    assert {path for path in (engines / "tiny" / "denoiser").iterdir() if path.is_dir()} == built
    stage, policy = module.stages["denoiser"], list(module.trainable_parameters().values())
    inputs = at_shape(stage.networks[0], 2, 2, 48, 32)
    assert stage.networks[0].samples("opt")["lora_scale"].item() == 2
    pointers = [parameter.data_ptr() for parameter in policy]
    optimizer = torch.optim.AdamW(policy, lr=1e-2)
    before = module.runtime["denoiser"](**inputs)["velocity"]
    for _ in range(3):
        module.trained_experts[-1].module(**inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_parity(stage, module, inputs)
    after = module.runtime["denoiser"](**inputs)["velocity"]
    assert (after - before).norm() > 0.05 * before.norm()
    assert [parameter.data_ptr() for parameter in policy] == pointers


def test_scale_zero_is_the_base_model(make_module: MakeModule, engines: Path) -> None:
    module = make_module(plan="onnxruntime", engines=engines)
    inputs = at_shape(module.stages["denoiser"].networks[0], 2, 3, 32, 32)
    policy = module.runtime["denoiser"](**inputs)["velocity"]
    base = module.runtime.run("denoiser", inputs, variant=REFERENCE)["velocity"]
    with torch.no_grad():
        for name, parameter in module.trainable_parameters().items():
            if "lora_B" in name:
                parameter.zero_()
    without = module.runtime["denoiser"](**inputs)["velocity"]
    torch.testing.assert_close(base, without, atol=1e-6, rtol=0)
    assert (policy - base).norm() > 0.01 * base.norm()


def test_live_tensors_are_bound_without_a_copy(
    make_module: MakeModule, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    bound: dict[str, int] = {}

    class Binding:
        """A binding that records the address of every input."""

        def __init__(self, binding: onnxruntime.IOBinding) -> None:
            self.binding = binding

        def __getattr__(self, name: str) -> object:
            return getattr(self.binding, name)

        def bind_ortvalue_input(self, name: str, value: onnxruntime.OrtValue) -> None:
            bound[name] = value.data_ptr()
            self.binding.bind_ortvalue_input(name, value)

    module = make_module(plan="onnxruntime", engines=engines)
    network = module.stages["denoiser"].networks[0]
    record = module.runtime.record("denoiser", "onnxruntime")
    assert record is not None
    (path,) = record.path.glob("*.onnx")
    assert set(network.live) == {spec.name for spec in network.live_specs}
    assert len(network.live) == len(lora_parameters(module.components.denoiser)) == 80
    own = onnxruntime.InferenceSession.io_binding
    monkeypatch.setattr(onnxruntime.InferenceSession, "io_binding", lambda session: Binding(own(session)))
    monkeypatch.setattr(
        onnxruntime.InferenceSession,
        "run_with_iobinding",
        lambda session, binding, options=None: session._sess.run_with_iobinding(binding.binding._iobinding, options),
    )
    runner = OnnxRuntimeRunner(path, network, torch.device("cpu"))
    inputs = network.samples("opt")
    runner(**inputs)
    assert bound == {name: tensor.data_ptr() for name, tensor in {**network.live, **inputs}.items()}


@pytest.fixture
def fresh(make_module: MakeModule) -> Stage:
    """Return a denoiser with a new LoRA, which has no effect."""
    return make_module(lora_spread=0).stages["denoiser"]


@pytest.fixture
def own_store(engines: Path, tmp_path: Path) -> EngineStore:
    """Return a copy of the store, from which engines can be deleted."""
    shutil.copytree(engines / "tiny" / "denoiser", tmp_path / "tiny" / "denoiser")
    return EngineStore(tmp_path)


def engine_of(stage: Stage, store: EngineStore) -> VerifiedEngine:
    record = find_engine(store, stage, "onnxruntime", weights_sha256(stage))
    assert record is not None
    return store.verify(record)


def test_a_new_lora_is_verified_with_other_values_and_keeps_its_own(fresh: Stage, own_store: EngineStore) -> None:
    live = fresh.networks[0].live
    before = {name: (tensor.data_ptr(), tensor.detach().clone()) for name, tensor in live.items()}
    assert any(not tensor.any() for tensor in live.values())
    manifest = verify_engine_parity(fresh, own_store, engine_of(fresh, own_store))
    assert [(parity.case, parity.network) for parity in manifest.parity] == [
        (case, "denoiser") for case in ("opt", "min", "sample", "base")
    ]
    for name, tensor in live.items():
        pointer, values = before[name]
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, values)
        assert tensor.grad is None


def test_an_engine_that_does_not_read_the_lora_is_found_out(
    fresh: Stage, own_store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, live = engine_of(fresh, own_store), fresh.networks[0].live
    before = {name: tensor.detach().clone() for name, tensor in live.items()}
    bind = onnxruntime_backend._bind

    def bind_copies(binding: Any, name: str, tensor: Tensor) -> None:
        bind(binding, name, before.get(name, tensor))

    monkeypatch.setattr(onnxruntime_backend, "_bind", bind_copies)
    with pytest.raises(ParityError, match=r"velocity of denoiser \(opt\).*The engine was deleted"):
        verify_engine_parity(fresh, own_store, engine)
    assert own_store.get(engine.manifest.id) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.items())


def test_an_engine_that_does_not_heed_the_scale_is_found_out(
    fresh: Stage, own_store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, bind = engine_of(fresh, own_store), onnxruntime_backend._bind
    one = torch.ones(())

    def bind_one(binding: Any, name: str, tensor: Tensor) -> None:
        bind(binding, name, one if name == "lora_scale" else tensor)

    monkeypatch.setattr(onnxruntime_backend, "_bind", bind_one)
    with pytest.raises(ParityError, match=r"velocity of denoiser \(base\)"):
        verify_engine_parity(fresh, own_store, engine)


class WrongTextEncoderStage(TextEncoderStage):
    """A stage whose `torch` computes something else than its networks."""

    def torch(self, inputs: Tensors, variant: str | None = None) -> dict[str, Tensor]:
        return {name: 1.001 * value for name, value in super().torch(inputs, variant).items()}


LOOSE = Tolerance(atol=1000, rtol=0, cosine=-1)


def test_an_engine_that_computes_something_else_is_not_kept(make_module: MakeModule, tmp_path: Path) -> None:
    """Compare with the stage's own `torch` after a build."""
    stage = make_module().stages["text_encoder"]
    assert isinstance(stage, TextEncoderStage)
    other = WrongTextEncoderStage(**vars(stage))
    with pytest.raises(ParityError, match="differs from PyTorch"):
        export_stage(other, "onnxruntime", EngineStore(tmp_path))
    assert EngineStore(tmp_path).find() == []


def test_an_engine_that_was_verified_within_looser_bounds_is_measured_anew(
    make_module: MakeModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, stage = EngineStore(tmp_path), make_module().stages["text_encoder"]
    assert isinstance(stage, TextEncoderStage)
    other = WrongTextEncoderStage(**vars(stage))
    assert export_stage(replace(other, tolerance=LOOSE), "onnxruntime", store).built
    assert not export_stage(replace(other, tolerance=LOOSE), "onnxruntime", store).built
    Runtime({"text_encoder": other}, "onnxruntime", tmp_path)["text_encoder"](**other.cases()["sample"].inputs)
    assert caplog.text.count("its onnxruntime engine was verified with looser tolerances") == 1
    assert "frostline export MODEL --stages text_encoder --backend onnxruntime" in caplog.text
    with pytest.raises(ParityError, match="differs from PyTorch"):
        export_stage(other, "onnxruntime", store)
    assert store.find() == []


def test_an_engine_that_keeps_bounds_that_are_asked_for_later_is_present(
    make_module: MakeModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, stage = EngineStore(tmp_path), make_module().stages["text_encoder"]
    first = export_stage(replace(stage, tolerance=LOOSE), "onnxruntime", store)
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "verify_engine_parity", lambda *_: pytest.fail("measured again"))
        assert export_stage(stage, "onnxruntime", store) == Exported(first.manifest, built=False)
    Runtime({"text_encoder": stage}, "onnxruntime", tmp_path)["text_encoder"](**stage.cases()["sample"].inputs)
    assert "looser tolerances" not in caplog.text
    tight = replace(stage, tolerance=Tolerance(atol=0, rtol=0, cosine=1))
    with pytest.raises(ParityError):
        export_stage(tight, "onnxruntime", store)


def test_every_engine_was_verified_and_timed(variant_engines: Path, modules: dict[str, WanTrainingModule]) -> None:
    store = EngineStore(variant_engines)
    exported = [
        export_stage(stage, "onnxruntime", store) for module in modules.values() for stage in module.stages.values()
    ]
    assert not any(export.built for export in exported)
    manifests = {export.manifest.id: export.manifest for export in exported}
    # The six stages of tiny, the denoiser of tiny-ti2v, and the high-noise expert of tiny-moe.
    assert len(manifests) == 8
    for engine, manifest in manifests.items():
        assert (record := store.get(engine))
        assert store.verify(record).manifest == manifest
        assert manifest.verified
        assert manifest.parity
        assert all(parity.passed for parity in manifest.parity)
        assert set(manifest.latency_ms) == {"torch", "onnxruntime"}


def test_an_engine_that_is_there_is_not_built_again(make_module: MakeModule, engines: Path) -> None:
    stage = make_module(lora={"rank": 2}).stages["denoiser"]
    exported = export_stage(stage, "onnxruntime", EngineStore(engines))
    assert not exported.built
    assert exported.worst.passed
