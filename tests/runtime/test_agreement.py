"""Two processes use the same backend for a stage, or one stops with an error: they never wait for each other."""

import json
from pathlib import Path
from typing import Any

import pytest
from forked import run_ranks
from test_guard import ORT, scaled_stage

from frostline.export.exporter import export_stage
from frostline.runtime.engines.store import EngineStore


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("agreement")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FROSTLINE_SIGNING_KEY_FILE", str(session_signing_key))
        export_stage(scaled_stage(), ORT, EngineStore(out / "engines"))
        script = str(Path(__file__).with_name("agreement_runs.py"))
        run_ranks(script, str(out / "engines"), str(out), timeout=240)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_an_engine_that_one_process_lacks_serves_none(found: list[dict[str, Any]]) -> None:
    assert [each["alike"] for each in found] == [ORT, ORT]
    assert [each["apart"] for each in found] == ["torch", "torch"]


def test_an_engine_serves_while_the_weights_are_sharded(found: list[dict[str, Any]]) -> None:
    assert [each["sharded"] for each in found] == [[4, 32], [4, 32]]


def test_a_failure_in_one_process_over_sharded_weights_is_an_error_and_no_fall_back(
    found: list[dict[str, Any]],
) -> None:
    assert found[0]["failure"] == ""
    assert "cannot fall back to torch: start again with plan scaled=torch (broken)" in found[1]["failure"]
