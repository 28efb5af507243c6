"""Frozen parts are released while engines or the cache are used instead, and results do not change."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from frostline.errors import ConfigError
from frostline.export.exporter import export_stage
from frostline.models.checkpoints.loading import load_components
from frostline.models.lazy_weights import FROZEN_PARTS, PartWeights
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.identity.fingerprint import weights_sha256
from frostline.train import WanTrainingModule
from frostline.train.launch import build_module
from frostline.train.settings import RunSettings

MakeModule = Callable[..., WanTrainingModule]

DATA: dict[str, Any] = {"prompt": ["a person nods"], "video": torch.rand(1, 5, 3, 64, 64)}
SETTINGS: dict[str, Any] = {"lora": {"rank": 8}, "grad_start_step": 6, "num_inference_steps": 8}


@pytest.fixture(autouse=True)
def digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def parameters_of(components: Any, part: str) -> list[torch.nn.Parameter]:
    if part == "vae_encoder":
        return [*components.vae.model.encoder.parameters(), *components.vae.model.conv1.parameters()]
    return list(getattr(components, part).parameters())


def in_memory(module: WanTrainingModule) -> set[str]:
    return {p for p in module.components.weights if sum(x.numel() for x in parameters_of(module.components, p)) > 0}


def test_parts_are_away_while_engines_serve_them(make_module: MakeModule, variant_engines: Path) -> None:
    eager = make_module("tiny-moe", plan="onnxruntime", engines=variant_engines, lora_spread=0, **SETTINGS)
    assert in_memory(eager) == {"text_encoder", "vae_encoder", "denoiser_high_noise"}
    released = make_module("tiny-moe", plan="onnxruntime", engines=variant_engines, lora_spread=0, **SETTINGS)
    storage = weakref.ref(parameters_of(released.components, "denoiser_high_noise")[0].untyped_storage())
    released.runtime.release_weights()
    gc.collect()
    assert storage() is None
    assert in_memory(released) == set()
    expected, actual = eager(DATA), released(DATA)
    assert in_memory(released) == set()
    assert [x.item() for x in actual] == [x.item() for x in expected]


def test_a_run_plans_before_it_looks_at_weights(engines: Path, tmp_path: Path) -> None:
    """Release what engines replace, also in the first run, which reads the weights for their digests."""
    run = {"model": "tiny", "output_dir": tmp_path, "lora": {"rank": 8}}
    plan = {"engines": engines, "backend": "onnxruntime", "stages": {"vae_encoder": "torch"}}
    module = build_module(RunSettings.parse({**run, "plan": plan}), torch.device("cpu"))
    assert {name for name, choice in module.runtime.plan.items() if choice.backend == "torch"} == {"vae_encoder"}
    assert in_memory(module) == set()


def test_weights_that_are_still_to_come_are_counted(make_module: MakeModule, variant_engines: Path) -> None:
    settings = {**SETTINGS, "engines": None, "plan": "torch"}
    module = WanTrainingModule.from_pretrained("tiny-moe", **settings)
    away = {name: weights.nbytes for name, weights in module.components.weights.items() if not weights.resident}
    assert away.keys() == {"text_encoder", "vae_encoder", "denoiser_high_noise"}
    assert module.runtime.pending_bytes() == sum(away.values()) > 0
    module.runtime.idle = frozenset({"text_encoder"})
    assert module.runtime.pending_bytes() == sum(away.values()) - away["text_encoder"]
    module.runtime.idle = frozenset()
    module(DATA)
    assert module.runtime.pending_bytes() == 0
    served = make_module("tiny-moe", plan={"*": "torch", "denoiser": "onnxruntime"}, engines=variant_engines)
    frozen = sum(p.nbytes for p in served.components.denoiser.parameters())
    assert served.runtime.pending_bytes() == frozen, "the engine's copy of the weights is not loaded yet"
    served(DATA)
    assert served.runtime.pending_bytes() == 0


def test_never_loaded_where_the_cache_knows_the_answer(tmp_path: Path, digests: Path) -> None:
    settings = {**SETTINGS, "engines": None, "plan": "torch", "cache_dir": tmp_path / "frozen"}
    first = WanTrainingModule.from_pretrained("tiny-moe", **settings)
    # The digests of the weights are not known yet; cache entries are named by them, so the weights are read.
    expected = first(DATA)
    assert in_memory(first) == {"text_encoder", "vae_encoder", "denoiser_high_noise"}
    assert len(list(digests.iterdir())) == 3
    second = WanTrainingModule.from_pretrained("tiny-moe", **settings)
    assert in_memory(second) == set()
    actual = second(DATA)
    assert in_memory(second) == set()
    assert [x.item() for x in actual] == [x.item() for x in expected]
    second({**DATA, "prompt": ["a person talks"]})
    assert "text_encoder" in in_memory(second)
    second.runtime.release_weights("text_encoder", "vae_encoder")
    assert in_memory(second) == {"denoiser_high_noise"}
    assert [x.item() for x in second(DATA)] == [x.item() for x in expected]


def test_a_stage_comes_back_where_torch_is_asked_for(make_module: MakeModule, engines: Path) -> None:
    module = make_module(plan="onnxruntime", engines=engines)
    video = torch.rand(1, 3, 5, 64, 64) * 2 - 1
    expected = module.runtime["vae_encoder"](video=video)["latents"]
    module.runtime.release_weights()
    assert in_memory(module) == set()
    with module.runtime.use(vae_encoder="torch"):
        torch.testing.assert_close(
            module.runtime["vae_encoder"](video=video)["latents"], expected, atol=1e-4, rtol=1e-4
        )
    assert in_memory(module) == {"vae_encoder"}


def test_a_live_use_of_the_frozen_expert_reads_it() -> None:
    settings = {"lora": {"rank": 8}, "grad_start_step": 2, "engines": None, "plan": "torch", "cache_bytes": 0}
    module = WanTrainingModule.from_pretrained("tiny-moe", **settings)
    assert "denoiser_high_noise" not in in_memory(module)
    loss, _, _ = module(DATA)
    loss.backward()
    assert "denoiser_high_noise" in in_memory(module)
    assert all(parameter.grad is not None for parameter in module.trainable_parameters().values())


def test_a_digest_is_the_same_read_or_recalled(make_module: MakeModule, digests: Path) -> None:
    stages = make_module("tiny-moe").stages
    expected = {name: weights_sha256(stages[name]) for name in ("text_encoder", "denoiser_high_noise")}
    assert not digests.exists(), "digests of weights in memory must not be stored"
    for _ in range(2):
        module = WanTrainingModule.from_pretrained("tiny-moe", engines=None, plan="torch", **SETTINGS)
        assert {name: weights_sha256(module.stages[name]) for name in expected} == expected
    assert not module.stages["text_encoder"].weights.resident  # type: ignore[union-attr]
    next(digests.iterdir()).write_text("damaged")
    assert {name: weights_sha256(module.stages[name]) for name in expected} == expected


def test_parts_that_are_away_are_read_for_an_export(make_module: MakeModule, engines: Path, tmp_path: Path) -> None:
    module = make_module()
    expected = weights_sha256(module.stages["text_encoder"])
    module.runtime.release_weights("text_encoder")
    exported = export_stage(module.stages["text_encoder"], "onnxruntime", EngineStore(tmp_path / "engines"))
    assert exported.manifest.verified
    assert exported.manifest.weights_sha256 == expected


def test_a_file_that_changed_is_refused(tmp_path: Path, checkpoint_files: Callable[[], list[Any]]) -> None:
    listed = checkpoint_files()
    components = load_components(listed, defer=FROZEN_PARTS)
    weights = components.weights["text_encoder"]
    path = next(Path(entry) for entry in listed if "text" in str(entry))
    save_file({**load_file(path), "more": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="has changed since it was loaded"):
        weights.restore()
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        weights.restore()


@pytest.fixture
def checkpoint_files(tmp_path: Path) -> Callable[[], list[Any]]:
    """Return a function that copies tiny's files, and returns their paths."""
    source = Path(load_components.__code__.co_filename).parents[1] / "tiny" / "weights" / "tiny"

    def copy() -> list[Any]:
        paths = []
        for name in ("diffusion_pytorch_model", "Wan2.1_VAE", "models_t5_umt5-xxl-enc"):
            path = tmp_path / f"{name}.safetensors".replace("models_t5", "text")
            path.write_bytes((source / f"{name}.safetensors").read_bytes())
            paths.append(path)
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        return [*paths, source / "google" / "umt5-xxl"]

    return copy


def test_deferred_and_restored_is_what_was_loaded_at_once() -> None:
    eager = load_components("tiny-moe", torch.bfloat16)
    deferred = load_components("tiny-moe", torch.bfloat16, defer=FROZEN_PARTS)
    for part, weights in deferred.weights.items():
        assert not weights.resident, part
        weights.restore()
        assert weights.resident
        held = {id(p): p.nbytes for p in parameters_of(deferred, part)}
        assert weights.nbytes == sum(held.values())
    assert set(deferred.weights) <= set(FROZEN_PARTS)
    for (name, one), (_, other) in zip(eager.modules(), deferred.modules(), strict=True):
        ours, theirs = one.state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours), name


def test_empty_weights_compute_nothing() -> None:
    module = torch.nn.Linear(3, 2)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    weights = PartWeights(dict(module.named_parameters()), lambda: before, [Path(__file__)], nbytes=32)
    weights.release()
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 3))
    weights.restore()
    torch.testing.assert_close(module.weight.detach(), before["weight"])
