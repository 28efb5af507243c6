"""The manifest: which values it accepts, and that equal contents give equal JSON."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from frostline.errors import EngineError
from frostline.runtime.engines.manifest import EngineId, Manifest, NetworkInput, Parity, canonical_json


def parity(value: float) -> Parity:
    return Parity(
        network="add",
        case="random",
        output="y",
        max_abs=value,
        mean_abs=value,
        p99_abs=value,
        max_rel=value,
        mean_rel=value,
        p99_rel=value,
        cosine=1.0,
        passed=True,
    )


def test_json_and_back_is_the_same_manifest(manifest: Manifest) -> None:
    full = manifest.updated(
        opset=20,
        parity=(parity(1e-7),),
        versions={"onnxruntime": "1.24"},
        compute_capabilities=("8.9",),
        tolerance={"atol": 1e-4, "rtol": 1e-3, "cosine": 0.999},
        artifacts={"model.onnx": {"sha256": "a" * 64, "bytes": 3}},
    )
    again = Manifest.model_validate(json.loads(canonical_json(full.fields())))
    assert again == full
    assert canonical_json(again.fields()) == canonical_json(full.fields())


@given(st.floats())
def test_any_measurement_survives_json(value: float) -> None:
    fields = json.loads(canonical_json(json.loads(parity(value).model_dump_json())))
    again = Parity.model_validate(fields).max_abs
    assert again == value or (math.isnan(again) and math.isnan(value))


def test_canonical_json_ignores_order_and_refuses_nan() -> None:
    assert canonical_json({"b": 1, "a": (2,)}) == canonical_json({"a": [2], "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(math.nan)


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"format_version": 2},
        {"model": "../tiny"},
        {"stage": ""},
        {"backend": ".hidden"},
        {"key": "a-b"},
        {"weights_sha256": "abc"},
        {"artifacts": {"../model.onnx": {"sha256": "a" * 64, "bytes": 1}}},
        {"artifacts": {"sub/model.onnx": {"sha256": "a" * 64, "bytes": 1}}},
        {"created": "2025-01-01T00:00:00"},
        {"build_seconds": -1},
    ],
)
def test_bad_fields_are_refused(manifest: Manifest, change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        manifest.updated(**change)


@pytest.mark.parametrize(("low", "typical", "high"), [((1,), (1, 2), (3,)), ((4,), (2,), (8,)), ((1,), (9,), (8,))])
def test_shapes_must_be_ordered(low: tuple[int, ...], typical: tuple[int, ...], high: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="input x"):
        NetworkInput(name="x", dtype="float32", min=low, opt=typical, max=high)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
def test_an_engine_id_is_its_path(backend: str) -> None:
    engine = EngineId("Wan2.1-I2V-14B", "vae_encoder", backend, "abc")
    assert engine.path(Path("engines")) == Path(f"engines/Wan2.1-I2V-14B/vae_encoder/{backend}-abc")
    assert EngineId.of_path(engine.path(Path("engines"))) == engine


@pytest.mark.parametrize("path", ["", "a", "tiny/vae_encoder/README.md", "tiny/vae_encoder/.x-abc", "tiny/../x-abc"])
def test_other_paths_are_no_engines(path: str) -> None:
    assert EngineId.of_path(Path(path)) is None


@pytest.mark.parametrize("word", ["", ".", "..", "a/b", "a\n", "-a", ".a", "a..b", "ä", "a b"])
def test_unsafe_words_are_no_engine_ids(word: str) -> None:
    with pytest.raises(EngineError, match="model"):
        EngineId(word, "vae_encoder", "onnxruntime", "abc")
