"""The command line: exit codes, error messages, and the `engines` commands on real engines."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import run_python
from pseudo_terminal import on_terminal
from typer.testing import CliRunner

from frostline import __version__
from frostline.cli import app, main
from frostline.errors import ConfigError


def _run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "frostline", *arguments, cwd=cwd, timeout=200)


def test_version() -> None:
    result = _run("--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"frostline {__version__}")


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--help"], set()),
        (["--version"], set()),
        # The options of these commands are fields of a settings class.
        (["score", "--help"], {"pydantic"}),
        (["export", "--help"], {"pydantic"}),
    ],
    ids=" ".join,
)
def test_help_and_version_import_no_settings(arguments: list[str], needed: set[str]) -> None:
    code = f"""
import sys
from frostline.cli import main
sys.argv = ["frostline", *{arguments!r}]
try:
    main()
finally:
    print(*({{"pydantic", "torch", "numpy"}} & {{*sys.modules}}), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {*result.stderr.split()} == needed


def test_help_lists_every_command_with_its_help_line() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for name, line in (
        ("score", "Score videos with the same rewards as training"),
        ("sample", "Generate a clip from a prompt and an optional first frame"),
        ("export", "Build verified, signed engines for the frozen stages of a Wan model and of rewards."),
        ("plan", "Show the available backends of each stage"),
        ("cache", "Precompute the outputs of the frozen stages"),
        ("train", "Train a reward LoRA"),
        ("adapter", "Convert a LoRA adapter for other programs, or merge it into the model."),
    ):
        assert any(name in row and line in row for row in shown.splitlines()), name


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (["sc"], {"score"}),
        (["score", "--det"], {"--detector", "--detection-size"}),
        (["export", "--back"], {"--backend"}),
        (["adapter", "mer"], {"merge"}),
        (["init", "ti"], {"tiny"}),
    ],
    # The order of a set differs between processes, but pytest-xdist needs equal test ids in all workers.
    ids=lambda value: " ".join(sorted(value) if isinstance(value, set) else value),
)
def test_the_shell_completes_commands_and_their_options(words: list[str], completions: set[str]) -> None:
    assert _completed(*words) == completions


def _completed(*words: str) -> set[str]:
    """Return the completions of the last word in bash."""
    code = "import sys; sys.argv = ['frostline']; from frostline.cli import main; main()"
    environment = {
        **os.environ,
        "_FROSTLINE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["frostline", *words]),
        "COMP_CWORD": str(len(words)),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return {*result.stdout.split()}


@pytest.mark.parametrize("policy", [None, "passive"])
def test_how_long_threads_spin_is_set_unless_the_user_did(policy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(sys, "argv", ["frostline", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert ("GOMP_SPINCOUNT" in os.environ) is (policy is None)


SLOW = ("torch", "diffsynth", "transformers", "torchvision", "torch._dynamo", "sympy", "torch.onnx", "matplotlib")


@pytest.mark.parametrize(
    ("modules", "needed"),
    [
        ("frostline.cli, frostline.train.config_file, frostline.score.request", set()),
        # Scoring needs only a kernel of torchvision, and no tracer.
        ("frostline.score.run, frostline.score.table, frostline.train.step.module", {"torch"}),
    ],
    ids=["usage errors", "score"],
)
def test_what_takes_seconds_is_imported_where_it_is_needed(modules: str, needed: set[str]) -> None:
    code = f"import sys, {modules}; print(*(name for name in {SLOW!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert {*result.stdout.split()} == needed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "nowhere"), "nowhere is neither a directory nor a built-in model"),
        (("export", "missing.yaml"), "recipe missing.yaml does not exist"),
        (("export", "tiny", "--precision", "fp31"), "precision"),
        (("export", "tiny", "--min-shapes", "vide:1x5x3x64x64"), "unknown tensor 'vide'"),
        (("export", "tiny", "--min-shapes", "video:1x6x3x64x64"), "4k + 1 frames"),
        (("export", "tiny", "--backend", "onnx"), "unknown backend 'onnx'"),
        (("export", "tiny", "--stages", "vae_coder", "--dry-run"), "no stage 'vae_coder'"),
        (("export", "tiny", "--lora-targets", "nothing", "--dry-run"), "'nothing' matches no module"),
        (("demo", "--steps", "0"), "--steps"),
        (("cache", "missing.yaml"), "missing.yaml"),
        (("cache", "missing.yaml", "--batch-size", "0"), "--batch-size"),
        (("plan", "nowhere"), "nowhere is neither a directory"),
        (("no-such-command",), "no-such-command"),
    ],
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...], said: str, refused_usage: Callable[..., str]) -> None:
    assert said in refused_usage(*arguments)


def test_a_users_mistake_shows_no_traceback(tmp_path: Path) -> None:
    result = _run("export", "nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert "nowhere is neither a directory" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [("inspect", "abc"), ("verify", "abc"), ("rm", "abc")])
def test_an_unknown_engine_exits_with_1(command: tuple[str, str], tmp_path: Path) -> None:
    result = _run("engines", *command, "--engines-dir", str(tmp_path))
    assert result.returncode == 1
    assert "no engine in" in " ".join(result.stderr.split())


def test_export_then_inspect_verify_tamper_and_remove(tmp_path: Path) -> None:
    runner, store = CliRunner(), ["--engines-dir", str(tmp_path)]
    export = ["export", "tiny", "--stages", "text_encoder", "--backend", "onnxruntime", *store]
    assert runner.invoke(app, export).exit_code == 0
    manifest_file = next(tmp_path.glob("tiny/text_encoder/*/manifest.json"))
    built = manifest_file.stat().st_mtime_ns
    again = runner.invoke(app, export)
    assert again.exit_code == 0
    assert "present" in again.stdout
    assert manifest_file.stat().st_mtime_ns == built

    key = manifest_file.parent.name.removeprefix("onnxruntime-")
    shown = runner.invoke(app, ["engines", "inspect", key[:6], *store])
    manifest = json.loads(shown.stdout)
    assert (manifest["stage"], manifest["verified"]) == ("text_encoder", True)
    assert all(measured["passed"] for measured in manifest["parity"])
    assert runner.invoke(app, ["engines", "verify", *store]).exit_code == 0
    with pytest.raises(ConfigError, match="nosuch: no such folder of engines"):
        runner.invoke(app, ["engines", "verify", "--engines-dir", "nosuch"], catch_exceptions=False)
    listed = json.loads(runner.invoke(app, ["engines", "list", *store, "--json"]).stdout)["engines"]
    assert [(each["key"], each["stage"], each["verified"], each["problem"]) for each in listed] == [
        (key, "text_encoder", True, None)
    ]
    present = json.loads(runner.invoke(app, [*export, "--json"]).stdout)["engines"]
    assert [(each["key"], each["status"]) for each in present] == [(key, "present")]
    assert present[0]["max_abs_error"] == listed[0]["max_abs_error"] < 1e-3
    completed = _completed("engines", "inspect", *store, key[:3])
    assert completed == {key}, completed
    for columns in (80, 100, 120):
        for environment in ({}, {"NO_COLOR": "1"}):
            arguments = ["-m", "frostline", "engines", "list", *store]
            seen = on_terminal(*arguments, columns=columns, environment=environment)
            (row,) = (line for line in seen.lines if "text_encoder" in line)
            assert key in row.split() and "onnxruntime" in row.split(), seen.text
    piped = _run("engines", "list", *store).stdout.splitlines()
    assert len(piped) == 2 and key in piped[1] and piped[0].split()[-1] == "parity"

    artifact = next(path for path in manifest_file.parent.iterdir() if path != manifest_file)
    data = bytearray(artifact.read_bytes())
    data[len(data) // 2] ^= 1
    artifact.write_bytes(data)
    refused = runner.invoke(app, ["engines", "verify", key, *store], env={"COLUMNS": "300"})
    assert refused.exit_code == 1
    assert "refused" in refused.stdout
    assert runner.invoke(app, ["engines", "rm", key, *store]).exit_code == 0
    assert not manifest_file.exists()


def test_dry_run_builds_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "tiny", "--dry-run", "--engines-dir", str(tmp_path / "engines")])
    assert result.exit_code == 0
    assert "planned" in result.stdout
    assert not (tmp_path / "engines").exists()


def test_a_plan_as_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "tiny", "--engines-dir", str(tmp_path), "--json"])
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    stages = {each["stage"]: each for each in values["stages"]}
    assert stages["vae_encoder"]["backend"] == "torch"
    assert "no verified engine" in stages["vae_encoder"]["reason"]
    assert values["step"]["unmeasured"] == [*stages]


@pytest.mark.parametrize(
    "arguments", [["-h"], ["train", "-h"], ["score", "-h"], ["engines", "-h"], ["engines", "list", "-h"]], ids=" ".join
)
def test_h_is_short_for_help_everywhere(arguments: list[str]) -> None:
    runner = CliRunner()
    short, long = (runner.invoke(app, [*arguments[:-1], flag]) for flag in ("-h", "--help"))
    assert short.exit_code == 0 and "Usage:" in short.output
    assert short.output == long.output
    assert all(flag in short.output for flag in ("--help", "-h"))


@pytest.mark.parametrize("arguments", [("-v", "-q", "init"), ("init", "-vq"), ("engines", "list", "-q", "-v")])
def test_verbose_and_quiet_exclude_each_other(arguments: tuple[str, ...], refused_usage: Callable[..., str]) -> None:
    assert "cannot be combined" in refused_usage(*arguments)


def test_plan_names_each_stage_and_why(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "tiny", "--engines-dir", str(tmp_path)], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    assert "vae_encoder" in result.stdout
    assert "no verified engine" in result.stdout


def test_a_plan_for_other_rewards(tmp_path: Path) -> None:
    reward = ["--reward", "sharpness", "--engines-dir", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, ["plan", "tiny", *reward])
    assert result.exit_code == 0, result.output
    stages = {each["stage"] for each in json.loads(result.stdout)["stages"]}
    assert "denoiser" in stages
    assert not stages & {"face_detector", "face_embedder"}, "only the default reward needs them"


def test_brackets_in_a_message_are_no_style(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["frostline", "report", "[/red]run"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert "[/red]run: no such folder: give the output_dir" in capsys.readouterr().err
