"""The manifest of an engine: what it computes, its files, how it was built, and its deviation from PyTorch."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    StringConstraints,
    model_validator,
)

from frostline.errors import EngineError
from frostline.runtime.engines.tolerance import Tolerance

# One path component: never hidden (the store uses hidden names itself), and never a parent folder.
NAME = r"[A-Za-z0-9_](?:\.?[A-Za-z0-9_-])*"
KEY = r"[A-Za-z0-9_]+"

Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$", max_length=128)]
Key = Annotated[str, StringConstraints(pattern=f"^{KEY}$", max_length=64)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Shape = tuple[NonNegativeInt, ...]


def canonical_json(value: object) -> bytes:
    """Return the canonical form of a JSON value for hashing and signing: sorted keys, ASCII, indented by two spaces."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")


class _Part(BaseModel):
    # Infinity and NaN are valid measurements (such as a relative error against zero) but not valid JSON numbers.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Artifact(_Part):
    """Digest and size of one file of an engine."""

    sha256: Sha256
    bytes: NonNegativeInt


class NetworkInput(_Part):
    """An input, with the minimum, typical and maximum shape that the engine supports."""

    name: str
    dtype: str
    min: Shape
    opt: Shape
    max: Shape

    @model_validator(mode="after")
    def _shapes_are_ordered(self) -> Self:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ValueError(f"input {self.name}: min, opt and max shapes differ in rank")
        if any(not low <= typical <= high for low, typical, high in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError(f"input {self.name}: shapes must satisfy min <= opt <= max")
        return self


class NetworkOutput(_Part):
    """One output."""

    name: str
    dtype: str


class NetworkRecord(_Part):
    """A network of the stage (most stages have one, those of the VAE two, MTCNN three), and its file."""

    name: str
    artifact: Name
    inputs: tuple[NetworkInput, ...]
    outputs: tuple[NetworkOutput, ...]


class Parity(_Part):
    """Deviation of an engine's output from PyTorch's, for one output of one network on one test case."""

    network: str
    case: str
    output: str
    max_abs: float
    mean_abs: float
    p99_abs: float
    max_rel: float
    mean_rel: float
    p99_rel: float
    cosine: float
    passed: bool

    def keeps(self, bounds: Tolerance) -> bool:
        """Return whether the deviation is within `bounds`, which may differ from those of the original comparison."""
        scale = self.max_abs / self.max_rel if self.max_rel else 0.0
        return self.max_abs <= bounds.atol + bounds.rtol * scale and self.cosine >= bounds.cosine


@dataclass(frozen=True, order=True)
class EngineId:
    """The four values that identify an engine and determine its path in the store."""

    model: str
    stage: str
    backend: str
    key: str

    def __post_init__(self) -> None:
        for what, pattern in (("model", NAME), ("stage", NAME), ("backend", NAME), ("key", KEY)):
            word = getattr(self, what)
            if not re.fullmatch(pattern, word):
                raise EngineError(
                    f"{what} {word!r} is not a valid folder name: use letters, digits, '_' and (not in "
                    "keys) '-' and '.'"
                )

    def path(self, root: Path) -> Path:
        """Return `root/<model>/<stage>/<backend>-<key>`."""
        return root / self.model / self.stage / f"{self.backend}-{self.key}"

    @classmethod
    def of_path(cls, path: Path) -> "EngineId | None":
        """Return the id of the engine whose path is given; None if it is not the path of an engine."""
        backend, _, key = path.name.rpartition("-")
        try:
            return cls(path.parents[1].name, path.parent.name, backend, key)
        except (EngineError, IndexError):
            return None


class Manifest(_Part):
    """All metadata of an engine. `Build.commit` sets `artifacts`."""

    format_version: Literal[1] = 1
    stage: Name
    model: Name
    backend: Name
    precision: str
    key: Key
    weights_sha256: Sha256
    artifacts: dict[Name, Artifact] = {}
    opset: int | None = None
    networks: tuple[NetworkRecord, ...] = ()
    versions: dict[str, str] = Field(default={}, description="versions of torch and of the backend, by name")
    device: str = Field(description="target that the engine was built for: 'cpu', 'sm_89' or 'sm_89+sm_120'")
    compute_capabilities: tuple[str, ...] = ()
    build_seconds: float = Field(default=0.0, ge=0)
    parity: tuple[Parity, ...] = ()
    tolerance: Tolerance | None = None
    latency_ms: dict[str, float] = Field(default={}, description="by backend, all from one interleaved run")
    measured_on: str = Field(default="", description="the machine on which latency_ms was measured")
    verified: bool = Field(default=False, description="parity was measured on a device that runs the engine")
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))

    @property
    def id(self) -> EngineId:
        """Return the identity of the engine."""
        return EngineId(self.model, self.stage, self.backend, self.key)

    def fields(self) -> dict[str, object]:
        """Return the manifest as a plain JSON value."""
        return json.loads(self.model_dump_json())

    def updated(self, **changes: object) -> Self:
        """Return a copy with some fields replaced, fully validated (`model_copy` does not validate)."""
        return self.model_validate({**dict(self), **changes})

    def keeps(self, bounds: Tolerance) -> bool:
        """Return whether the engine was compared with PyTorch, and all measurements are within the bounds."""
        if not self.verified:
            return False
        if self.tolerance is not None and bounds.permits(self.tolerance):
            return True
        return bool(self.parity) and all(measured.keeps(bounds) for measured in self.parity)

    def same_engine(self, other: "Manifest") -> bool:
        """Return whether both describe the same files of the same engine; measurements may differ."""
        return self.id == other.id and self.artifacts == other.artifacts
