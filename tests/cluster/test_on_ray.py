"""Scoring and training on a real cluster of two CPUs: workers die, rows and adapters are those of one process."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from object_store import ObjectStore
from pyarrow import fs
from typer.testing import CliRunner

from frostline.cli import app
from frostline.video import write_video

SIZE, CLIPS = 64, 14
DEADLY, DEADLY_ONCE, UNREADABLE = 5, 9, 11
REWARD = ["--reward", "cluster_rewards:Deadly", "--backend", "torch", "--device", "cpu"]
# What differs from run to run.
OF_A_RUN = {"seconds"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips of two frames, of which one is white, one is black, and one is none; and `pairs.csv`."""
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
    assert "a worker died 2 times" in str(failed[0]["error"]) and "05.mp4" in said
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
