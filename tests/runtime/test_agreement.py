"""Two processes serve a stage from the same backend, or one stops with an error: they never wait for each other."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_guard import ORT, scaled_stage

from frostline.export.exporter import export_stage
from frostline.runtime.engines.store import EngineStore


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("agreement")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FROSTLINE_SIGNING_KEY_FILE", str(session_signing_key))
        export_stage(scaled_stage(), ORT, EngineStore(out / "engines"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        script = [sys.executable, str(Path(__file__).with_name("agreement_runs.py"))]
        processes = [
            subprocess.Popen(
                [*script, str(rank), port, str(out / "engines"), str(out)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
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
    assert "cannot fall back to torch alone: start again with plan scaled=torch (broken)" in found[1]["failure"]
