"""Scoring and training on a real cluster of two CPUs: if workers die, rows and adapters are those of one process."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forked import run_ranks
from object_store import ObjectStore
from pyarrow import fs
from safetensors.torch import load_file
from typer.testing import CliRunner

from frostline.cli import app
from frostline.video import write_video

TESTS = Path(__file__).parents[1]
# Ray and its workers take a minute to start if other processes use the cores.
pytestmark = pytest.mark.timeout(1200)
SIZE, CLIPS = 64, 14
DEADLY, DEADLY_ONCE, UNREADABLE = 5, 9, 11
REWARD = ["--reward", "cluster_rewards:Deadly", "--backend", "torch", "--device", "cpu"]
# The values that differ between runs.
OF_A_RUN = {"seconds"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `pairs.csv` and clips of two frames; one clip is white, one black, one unreadable. Return the folder."""
    folder = tmp_path_factory.mktemp("clips")
    names = [f"{index:02}.mp4" for index in range(CLIPS)]
    generator = np.random.default_rng(0)
    for index, name in enumerate(names):
        level = {DEADLY: 255, DEADLY_ONCE: 0}.get(index, 60 + 10 * index)
        noise = generator.integers(0, 20, (2, 3, SIZE, SIZE)) * (0 < level < 255)
        write_video(folder / name, torch.from_numpy((level + noise).astype(np.uint8)), lossless=True)
    (folder / names[UNREADABLE]).write_bytes(b"no video")
    (folder / "pairs.csv").write_text("video\n" + "\n".join(names) + "\n")
    return folder


def score(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["-q", "score", *map(str, arguments), *REWARD], env={"COLUMNS": "250"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def rows_of(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without(rows: Sequence[dict[str, object]], names: set[str]) -> list[dict[str, object]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def test_workers_die_and_all_other_rows_are_those_of_one_process(cluster: Path, clips: Path, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone.jsonl", tmp_path / "scores.jsonl"
    assert score("--pairs", clips / "pairs.csv", "--out", alone)[0] == 1
    expected = without(rows_of(alone), OF_A_RUN)

    code, said = score("--pairs", clips / "pairs.csv", "--out", out, "--ray", "local", "--workers", "2")
    assert code == 1
    found = without(rows_of(out), OF_A_RUN)
    assert [row["index"] for row in found] == list(range(CLIPS))
    failed = [row for row in found if row["status"] == "error"]
    assert [row["index"] for row in failed] == [DEADLY, UNREADABLE]
    assert "workers died 2 times" in str(failed[0]["error"]) and "05.mp4" in said
    assert [row for row in found if row["index"] != DEADLY] == [row for row in expected if row["index"] != DEADLY]
    assert (cluster / "killed").exists()
    scored = (cluster / "scored").read_text().splitlines()
    assert scored.count("1.0000") == 2 and not (tmp_path / "scores.jsonl.parts").exists()
    summary = json.loads((tmp_path / "scores.summary.json").read_text())
    assert (summary["videos"], summary["failed"]) == (CLIPS, 2)

    assert score("--pairs", clips / "pairs.csv", "--out", out, "--ray", "local", "--resume")[0] == 1
    assert (cluster / "scored").read_text().splitlines() == scored
    assert without(rows_of(out), OF_A_RUN) == found


def test_a_dataset_from_and_to_an_object_store_keeps_its_columns(
    cluster: Path, store: ObjectStore, clips: Path
) -> None:
    import ray.data

    from frostline.cluster.dataset import score_dataset
    from frostline.score.settings import ScoreSettings

    names = [f"{index:02}.mp4" for index in (0, 1, UNREADABLE)]
    for name in names:
        store.objects[f"/clips/{name}"] = (clips / name).read_bytes()
    urls = [*(f"s3://clips/{name}" for name in names), "s3://clips/missing.mp4"]
    system, path = fs.FileSystem.from_uri("s3://clips/clips.parquet")
    pq.write_table(pa.table({"video": urls, "seed": [7, 8, 9, 10]}), path, filesystem=system)

    settings = ScoreSettings.parse({"rewards": [{"type": "cluster_rewards:Deadly"}]})
    dataset = ray.data.read_parquet("s3://clips/clips.parquet")
    score_dataset(dataset, settings, workers=1, backend="torch", device="cpu").write_parquet("s3://results/scored")

    rows = sorted(pq.read_table("results/scored", filesystem=system).to_pylist(), key=lambda row: row["seed"])
    assert [(row["video"], row["seed"]) for row in rows] == list(zip(urls, (7, 8, 9, 10), strict=True))
    assert [row["status"] for row in rows] == ["ok", "ok", "error", "error"]
    assert rows[0]["deadly"] < rows[1]["deadly"] and rows[2]["deadly"] is None
    assert urls[2] in rows[2]["error"] and urls[3] in rows[3]["error"]
    assert "index" not in rows[0]


STEPS = 6


def config_of(folder: Path, data: Path) -> Path:
    """Return the configuration file of a run of six steps with fresh noise, and a checkpoint every second step."""
    config = {
        "model": "tiny",
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "data": {"source": str(data), "num_frames": 5, "height": SIZE, "width": SIZE},
        "rewards": [{"type": "cluster_rewards:Fragile"}],
        "plan": {"backend": "torch"},
        "lora": {"rank": 4},
        "noise_seed": None,
        "num_inference_steps": 3,
        "grad_start_step": 1,
        "grad_end_step": 2,
        "gradient_checkpointing": "none",
        "train": {"max_train_steps": STEPS, "checkpointing_steps": 2, "learning_rate": 1e-3},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))
    return path


def test_a_worker_is_lost_and_the_adapter_is_that_of_an_undisturbed_run(cluster: Path, tmp_path: Path) -> None:
    """Compare bit for bit with an undisturbed run of two processes, which are started as by `accelerate launch`."""
    data = tmp_path / "data"
    for index in range(4):
        moving = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8)
        write_video(data / f"{index}.mp4", moving, lossless=True)
    (data / "metadata.csv").write_text("video,prompt\n" + "".join(f"{index}.mp4,a person nods\n" for index in range(4)))
    folders = [tmp_path / name for name in ("accelerate", "ray")]
    for folder in folders:
        folder.mkdir()
    launched, on_ray = (config_of(folder, data) for folder in folders)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    run_ranks("-m", "frostline", "train", str(launched), environment=environment, timeout=400)

    command = ["-q", "train", str(on_ray), "--ray", "local", "--num-workers", "2", "--max-failures", "1"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "250"})
    assert result.exit_code == 0, (result.output, result.exception)
    assert (cluster / "lost").exists() and "6 steps. The adapter is in" in result.output

    expected, found = (load_file(folder / "run" / "adapter" / "adapter_model.safetensors") for folder in folders)
    assert {*expected} == {*found}
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name in ("metrics.jsonl",):
        steps = [
            [json.loads(line)["loss"] for line in (folder / "run" / name).read_text().splitlines()]
            for folder in folders
        ]
        assert steps[0] == steps[1] and len(steps[0]) == STEPS
