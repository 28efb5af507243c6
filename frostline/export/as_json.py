"""Exports, engines and plans as plain values, for `--json`. Unknown values are None."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from frostline.export.result import ExportRow
from frostline.runtime.backends import TORCH
from frostline.runtime.engines.manifest import Manifest
from frostline.runtime.engines.store import EngineRecord

if TYPE_CHECKING:
    from frostline.export.plan_estimate import StageGain, StepGain


def export_values(rows: Iterable[ExportRow]) -> dict[str, Any]:
    """Return `{"engines": […]}` with one entry for each stage and backend of an export."""
    return {
        "engines": [
            {
                "stage": row.stage,
                "backend": row.backend,
                "status": row.status,
                "key": None if row.manifest is None else row.manifest.key,
                "seconds": row.seconds,
                **_measured(row.manifest),
                "note": row.note,
            }
            for row in rows
        ]
    }


def engine_values(records: Iterable[EngineRecord]) -> dict[str, Any]:
    """Return `{"engines": […]}` with one entry for each engine of a store, verified or not."""
    return {"engines": [_engine(record) for record in records]}


def plan_values(gains: Iterable[StageGain], step: StepGain) -> dict[str, Any]:
    """Return `{"stages": […], "step": {…}}`: candidates and choice of each stage, and the predicted step time."""
    return {
        "stages": [
            {
                "stage": gain.stage,
                "backend": gain.choice.backend,
                "reason": gain.choice.reason,
                "candidates": [asdict(candidate) for candidate in gain.candidates],
            }
            for gain in gains
        ],
        "step": asdict(step),
    }


def _engine(record: EngineRecord) -> dict[str, Any]:
    manifest = record.manifest
    values = {
        "model": record.id.model,
        "stage": record.id.stage,
        "backend": record.id.backend,
        "key": record.id.key,
        "path": str(record.path),
        "bytes": record.bytes,
        "problem": record.problem,
    }
    if manifest is not None:
        values |= {
            "device": manifest.device,
            "precision": manifest.precision,
            "created": manifest.created.isoformat(),
            "verified": manifest.verified,
            **_measured(manifest),
        }
    return values


def _measured(manifest: Manifest | None) -> dict[str, Any]:
    """Return the largest error, the lowest cosine similarity, and the latencies of engine and torch."""
    parity, latency = ((), {}) if manifest is None else (manifest.parity, manifest.latency_ms)
    return {
        "max_abs_error": max((each.max_abs for each in parity), default=None),
        "cosine": min((each.cosine for each in parity), default=None),
        "ms": None if manifest is None else latency.get(manifest.backend),
        "torch_ms": latency.get(TORCH),
    }
