"""Records of exports: an export is skipped if its record is signed by this user and its engines are still valid."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from frostline.export.export_cache import Receipt, recall, receipt_key, remember
from frostline.export.recipe import Recipe
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.engines.manifest import EngineId, Manifest, Parity
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.identity import computation

BOUNDS = Tolerance(atol=1e-5, rtol=1e-5, cosine=0.999)
LOOSE = Tolerance(atol=float("inf"), rtol=1.0, cosine=-1.0)
KEY = "0123456789abcdef"


def parity(max_abs: float = 1e-6, cosine: float = 1.0) -> Parity:
    """Return the parity of an output whose largest value is 2."""
    errors = {"max_abs": max_abs, "mean_abs": 0.0, "p99_abs": 0.0, "mean_rel": 0.0, "p99_rel": 0.0}
    return Parity(network="n", case="opt", output="y", **errors, max_rel=max_abs / 2, cosine=cosine, passed=True)


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path)


@pytest.fixture
def build(store: EngineStore) -> Callable[..., Manifest]:
    """Return a function that commits an engine of one file, verified within `BOUNDS`, or replaces it."""

    def build(stage: str = "text_encoder", **changes: Any) -> Manifest:
        engine = EngineId("tiny", stage, "onnxruntime", KEY)
        fields = {"precision": "fp32", "weights_sha256": "0" * 64, "device": "cpu", "verified": True}
        manifest = Manifest(**vars(engine), **{**fields, "parity": (parity(),), "tolerance": BOUNDS, **changes})  # type: ignore[arg-type]
        with store.building(engine) as building:
            (building.folder / "engine.bin").write_bytes(b"engine")
            return building.commit(manifest).manifest

    return build


def write(store: EngineStore, *engines: Manifest, bounds: Tolerance = BOUNDS) -> Path:
    remember(store, KEY, [Receipt.of(engine, bounds) for engine in engines])
    return store.root / ".receipts" / f"{KEY}.json"


def test_what_was_exported_is_there(store: EngineStore, build: Callable[..., Manifest]) -> None:
    assert recall(store, KEY) is None
    engines = [build("text_encoder"), build("vae_encoder")]
    write(store, *engines)
    assert recall(store, KEY) == engines
    store.remove(store.find()[0])
    assert recall(store, KEY) is None


def test_an_altered_receipt_is_not_believed(store: EngineStore, build: Callable[..., Manifest]) -> None:
    path = write(store, build("text_encoder"))
    build("vae_encoder")
    written = path.read_text()
    for altered in (
        written.replace("text_encoder", "vae_encoder"),
        written.replace('"cosine":0.999', '"cosine":-1.0'),
        written.replace('"verified":true', '"verified":false'),
        json.dumps({**json.loads(written), "engines": []}),
        json.dumps({**json.loads(written), "signature": ""}),
        json.dumps({**json.loads(written), "signature": "\ud800"}),
        written[:-10],
        "[" * 100_000,
        "",
    ):
        assert altered != written
        path.write_text(altered)
        assert recall(store, KEY) is None, altered[:200]
    path.write_text(written)
    assert recall(store, KEY) is not None
    shutil.copy(path, path.with_name("fedcba9876543210.json"))
    assert recall(store, "fedcba9876543210") is None


def test_a_receipt_of_another_key_is_not_believed(
    store: EngineStore, build: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()
    path = write(store, engine)
    own = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setenv("FROSTLINE_SIGNING_KEY_FILE", str(tmp_path / "other.key"))
        write(store, engine)
    assert path.read_bytes() != own
    assert recall(store, KEY) is None


def test_engines_are_held_against_the_bounds_that_were_asked_for(
    store: EngineStore, build: Callable[..., Manifest]
) -> None:
    write(store, build(), bounds=BOUNDS)
    build(tolerance=LOOSE, parity=(parity(max_abs=0.5, cosine=0.1),))
    assert recall(store, KEY) is None, "the parity is outside the requested bounds"
    build(tolerance=LOOSE, parity=(parity(max_abs=2e-5),))
    assert recall(store, KEY) is not None, "2e-5 is within atol + rtol * 2"
    build(tolerance=LOOSE, parity=(parity(), parity(max_abs=4e-5)))
    assert recall(store, KEY) is None
    write(store, build(), bounds=LOOSE)
    build(tolerance=LOOSE, parity=(parity(max_abs=0.5, cosine=0.1),))
    assert recall(store, KEY) is not None


def test_what_was_verified_must_be_verified_still(store: EngineStore, build: Callable[..., Manifest]) -> None:
    unverified = {"verified": False, "parity": ()}
    write(store, build())
    build(**unverified)
    assert recall(store, KEY) is None
    write(store, build(**unverified))
    assert recall(store, KEY) is not None, "the export could not verify it either"
    build(parity=(parity(max_abs=1.0),), tolerance=LOOSE)
    assert recall(store, KEY) is None


def test_a_receipt_that_cannot_be_written_fails_no_export(store: EngineStore, build: Callable[..., Manifest]) -> None:
    engine = build()
    (store.root / ".receipts").touch()
    write(store, engine)
    assert recall(store, KEY) is None


def test_the_key_follows_bounds_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(bounds: dict[str, float | None], recipe: Recipe = Recipe(model="tiny")) -> str:  # noqa: B008
        return receipt_key(recipe, BuildOptions(), "cpu", bounds)

    keys = [key({}), key({"atol": 1.0}), key({"atol": None}), key({"atol": float("inf")}), key({"atol": float("nan")})]
    keys += [key({}, Recipe(model="tiny", backends=("openvino",))), key({}, Recipe(model="tiny-moe"))]
    assert len({*keys}) == len(keys)


@pytest.mark.parametrize(
    ("backend", "package", "other"),
    [
        ("onnxruntime", "onnxruntime", "openvino"),
        ("openvino", "openvino", "onnxruntime"),
        ("tensorrt", "tensorrt", "tensorrt_rtx"),
        ("tensorrt-rtx", "tensorrt_rtx", "tensorrt"),
        ("aotinductor", "torch", "onnxruntime"),
    ],
)
def test_the_key_follows_the_versions_of_what_its_backends_import(
    backend: str, package: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, recipe = computation._installed, Recipe(model="tiny", backends=(backend,))

    def key_with(upgraded: str) -> str:
        monkeypatch.setattr(computation, "_installed", lambda top: "99" if top == upgraded else installed(top))
        return receipt_key(recipe, BuildOptions(), "cpu", {})

    assert key_with("nothing") == key_with(other) != key_with(package)
