"""Every command in README and the quickstart runs; the commands of all other pages exist, with their options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from document_commands import COMMANDS, OTHERS, PYTHON, REASONS, ROOT, blocks, commands, problem

from frostline.demo.dataset import write_datasets
from frostline.documents import read_yaml

RUN = (ROOT / "README.md", ROOT / "docs" / "quickstart.md")
PAGES = sorted([ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_blocks_say_what_they_are_and_why_they_are_not_run(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= {COMMANDS, PYTHON, *OTHERS}
    assert {block.reason for block in blocks(page)} <= {None, *REASONS}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_commands_run_in_a_fresh_folder(page: Path, tmp_path: Path) -> None:
    write_datasets(tmp_path / "runs" / "demo" / "data", train_clips=2, held_out=1)  # what the demo leaves
    script = ["set -euo pipefail"]
    elsewhere = [block for other in RUN[: RUN.index(page)] for block in blocks(other)]
    runnable = [block for block in blocks(page) if block.reason is None and block not in elsewhere]
    for number, block in enumerate(runnable):
        if block.language == COMMANDS:
            script.append(block.text)
        elif block.language == PYTHON:
            (tmp_path / f"block_{number}.py").write_text(block.text)
            script.append(f"python block_{number}.py")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page: Path) -> None:
    wrong = [
        f"{' '.join(command)}: {what}"
        for block in blocks(page)
        if block.language in (COMMANDS, "")
        for command in commands(block.text)
        if (what := problem(command)) is not None
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("frostline trian my.yaml", "No such command"),
        ("frostline sample tiny --out a.mp4", "missing"),
        ("frostline score a.mp4 --refrence b.jpg", "No such option"),
        ("frostline train my.yaml train.learning_rat=1", "unknown setting"),
        ("accelerate launch --num_processes 8 -m frostline train my.yaml lora.rank=x", "lora.rank"),
        ("make dmo", "no target"),
        ("pip install 'frostline[opnvino]'", "no extra"),
        ("python benchmarks/nothing.py", "no file"),
    ],
)
def test_a_wrong_command_is_found(line: str, what: str) -> None:
    (command,) = commands(line)
    assert what in (problem(command) or "")


@pytest.mark.parametrize("script", sorted((ROOT / "docs" / "examples").glob("*.slurm")), ids=lambda path: path.name)
def test_batch_scripts_are_valid(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    launch = script.read_text().partition("exec ")[2].partition("' frostline")[0]
    for variable in ("$((SLURM_NNODES * GPUS_PER_NODE))", "$WORKERS"):
        launch = launch.replace(variable, "16")
    (command,) = commands(launch.replace('"$@"', "tiny.yaml"))
    assert command[:2] in (["accelerate", "launch"], ["ray", "symmetric-run"])
    if command[0] == "ray":
        command = command[command.index("--") + 1 :]
    assert problem(command) is None
    inner = script.read_text().partition("bash -c '")[2].partition("' frostline")[0]
    subprocess.run(["bash", "-n", "-c", inner], check=True)


def test_the_manifest_of_kuberay_is_valid() -> None:
    job = read_yaml(ROOT / "docs" / "examples" / "rayjob.yaml")
    assert isinstance(job, dict) and (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    (command,) = commands(job["spec"]["entrypoint"])
    assert problem(command) is None
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
