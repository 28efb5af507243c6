"""What a run on a cluster reads and writes, tested without one: pairs, parts, results, videos that kill workers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_store import ObjectStore

from frostline.cluster import session
from frostline.cluster.ledger import Ledger
from frostline.cluster.pair_files import PairSource
from frostline.cluster.parts import ResultParts
from frostline.cluster.result_files import StoredRows
from frostline.cluster.score_run import _left, _tables
from frostline.cluster.session import ClusterOptions
from frostline.errors import ConfigError, DataError
from frostline.rewards.inputs import Need
from frostline.score.files import ResultFile
from frostline.score.request import Pair, gather_pairs
from frostline.score.result import VideoScore
from frostline.score.settings import ScoreSettings

NEEDS: frozenset[Need] = frozenset({"reference"})
PAIRS = [
    {"video": "a.mp4", "reference": "face.png", "prompt": "hello"},
    {"video": "b.mp4", "reference": "", "prompt": ""},
    {"video": "../c.mp4", "reference": "face.png", "prompt": ""},
]


def row(index: int, **values: object) -> VideoScore:
    common = {"video": f"{index}.mp4", "reference": f"{index}.mp4", "settings": "s", "status": "ok"}
    return VideoScore.model_validate({"index": index, **common, **values})


def test_pairs_are_the_same_in_every_format(tmp_path: Path) -> None:
    lines = [",".join(PAIRS[0]), *(",".join(pair.values()) for pair in PAIRS)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in PAIRS))
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "pairs.parquet")
    expected = gather_pairs([], None, tmp_path / "pairs.csv")
    assert "outside" in expected[2].fault
    for suffix in ("csv", "jsonl", "parquet"):
        source = PairSource(file=str(tmp_path / f"pairs.{suffix}"), needs=NEEDS)
        assert list(source) == expected
        assert source.check() == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("pairs.jsonl", '{"video": 3}', "line 1: video: must be text"),
        ("pairs.jsonl", '{"video": "a.mp4"}\n{"clip": "b.mp4"}', "line 2: has no column 'video'"),
        ("pairs.jsonl", "[", "line 1: "),
        ("pairs.parquet", "no table", "cannot be read"),
        ("pairs.txt", "a.mp4", "use one of .csv, .jsonl, .parquet"),
        ("pairs.csv", "video\n", "contains no rows"),
    ],
)
def test_what_is_no_file_of_pairs(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        PairSource(file=str(tmp_path / name), needs=NEEDS).check()


def test_pairs_at_a_url_name_what_is_beside_them(store: ObjectStore) -> None:
    rows = [{"video": "a.mp4"}, {"video": "s3://others/b.mp4"}, {"video": "../c.mp4"}, {"video": "s3://clips/in/d.mp4"}]
    store.objects["/clips/in/pairs.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    pairs = list(PairSource(file="s3://clips/in/pairs.jsonl", needs=NEEDS))
    assert [pair.video for pair in pairs] == ["s3://clips/in/a.mp4", "s3://others/b.mp4", "../c.mp4", rows[3]["video"]]
    assert [bool(pair.fault) for pair in pairs] == [False, True, True, False]
    trusting = PairSource(file="s3://clips/in/pairs.jsonl", needs=NEEDS, allow_outside=True)
    assert not any(pair.fault for pair in trusting)


@pytest.mark.parametrize("root", ["", "s3://results/run"])
def test_parts_are_gone_through_in_the_order_of_the_input(root: str, tmp_path: Path, store: ObjectStore) -> None:
    parts = ResultParts(f"{root or tmp_path}/scores.jsonl.parts")
    assert list(parts) == [] and len(parts) == 0
    for flushed in ((7, 2), (0, 9, 1), (2, 3), (5, 4, 6, 8)):
        for index in flushed:
            parts.add(row(index, scores={"clip": index / 10}))
        parts.flush()
    assert [each.index for each in parts] == list(range(10))
    assert parts[3].scores == {"clip": 0.3} and [each.index for each in parts[8:]] == [8, 9]
    again = ResultParts(parts.folder)
    assert len(again) == 10
    again.delete()
    assert len(ResultParts(parts.folder)) == 0


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    """Damage only the rows first: the statistics at the end of the file can still be read."""
    parts = ResultParts(str(tmp_path / "parts"))
    parts.add(row(0))
    parts.flush()
    (part,) = (tmp_path / "parts").iterdir()
    stored = part.read_bytes()
    part.write_bytes(stored[:4] + b"\xff" * 60 + stored[64:])
    with pytest.raises(DataError, match=rf"(?s){part.name}: cannot be read: .*; use --overwrite to start over"):
        list(parts)
    part.write_bytes(b"no table")
    with pytest.raises(DataError, match=rf"{part.name}: cannot be read"):
        parts.count_rows()


def test_parts_that_cannot_be_deleted_are_named(tmp_path: Path) -> None:
    (tmp_path / "parts").write_text("a file instead of a folder")
    with pytest.raises(DataError, match="parts: cannot be deleted"):
        ResultParts(str(tmp_path / "parts")).delete()


def test_only_pairs_without_a_result_are_left(tmp_path: Path) -> None:
    settings = ScoreSettings()
    source = PairSource(tuple(f"{index}.mp4" for index in range(5)), "face.png", needs=NEEDS)
    parts = ResultParts(str(tmp_path / "parts"))
    for index in (3, 1):
        parts.add(row(index, reference="face.png", settings=str(settings)))
    parts.flush()
    assert [pair.index for pair in _left(source, parts, settings, "out")] == [0, 2, 4]
    with pytest.raises(ConfigError, match="other settings"):
        list(_left(source, parts, ScoreSettings(every=2), "out"))
    with pytest.raises(ConfigError, match="other videos"):
        list(_left(PairSource(("0.mp4", "x.mp4"), "face.png", needs=NEEDS), parts, settings, "out"))
    with pytest.raises(ConfigError, match=r"other videos \(3\.mp4\)"):
        list(_left(PairSource(("0.mp4", "1.mp4"), "face.png", needs=NEEDS), parts, settings, "out"))


def test_a_name_that_no_table_holds_is_a_row_of_its_own(tmp_path: Path) -> None:
    parts = ResultParts(str(tmp_path / "parts"))
    pairs = [Pair(0, "a.mp4", ""), Pair(1, "\udce9.mp4", ""), Pair(2, "b.mp4", "")]
    tables = list(_tables(iter(pairs), 2, "s", parts))
    assert [table["video"].to_pylist() for table in tables] == [["a.mp4", "b.mp4"]]
    parts.flush()
    (failed,) = parts
    assert failed.video == "\udce9.mp4" and failed.status == "error" and "not valid UTF-8" in failed.error
    out = StoredRows(str(tmp_path / "out.parquet"), ["clip"])
    out.rewrite(parts)
    assert out[0].video == "\\udce9.mp4"


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.csv", "scores.parquet", "s3://results/scores.parquet"])
def test_files_of_results_come_back_as_they_were(name: str, tmp_path: Path, store: ObjectStore) -> None:
    rows = [
        row(0, scores={"clip": 0.25}, face_score=0.5, frame_numbers=(0, 1), frame_scores=(0.5, None)),
        row(1, status="error", error="no"),
        row(2, scores={"clip": 0.5, "clip_b": 1.0}, worst_frame_landmarks=((1.0, 2.0), (3.0, 4.0))),
    ]
    where = name if "://" in name else str(tmp_path / name)
    out = StoredRows(where, ["face_score", "clip"])
    assert not out.exists() and list(out) == []
    out.rewrite(rows)
    again = StoredRows(where, ["face_score", "clip"])
    assert again.exists()
    again.fetch()
    assert list(again) == rows and len(again) == 3 and again[1:] == rows[1:] and again[-1] == rows[2]


def test_a_file_that_is_none_of_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "scores.parquet").write_text("x")
    with pytest.raises(DataError, match=r"scores\.parquet: is not a valid Parquet file of results"):
        list(StoredRows(str(tmp_path / "scores.parquet"), ["clip"]))
    with pytest.raises(ConfigError, match=r"must end in \.jsonl, \.csv or \.parquet"):
        StoredRows("scores.xlsx", ["clip"])


def test_a_row_that_was_written_by_half_is_no_row(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "scores.jsonl", ["clip"], faces=False)
    file.rewrite([row(0, scores={"clip": 0.5})])
    with file.path.open("a") as end:
        end.write('{"index":1,')
    assert [each.index for each in file.stream()] == [0]


def test_who_died_on_a_video_twice_is_known() -> None:
    ledger = Ledger()
    deadly, innocent, done = ("deadly.mp4", ""), ("innocent.mp4", ""), ("done.mp4", "")
    ledger.join("worker")
    ledger.begin("worker", [done, innocent, deadly, innocent])
    ledger.begin("other", [deadly])
    ledger.finish("worker", done)
    ledger.finish("worker", innocent)
    assert ledger.deaths([done, innocent, deadly]) == [0, 0, 0]
    ledger.join("worker")
    assert ledger.deaths([done, innocent, deadly]) == [0, 1, 1]
    ledger.begin("worker", [innocent])
    ledger.finish("worker", innocent)
    ledger.begin("worker", [deadly])
    ledger.join("worker")
    assert ledger.deaths([done, innocent, deadly]) == [0, 1, 2]


def test_a_worker_elsewhere_learns_what_it_needs() -> None:
    environment = {"FROSTLINE_SIGNING_KEY_FILE": "k", "HOME": "/home/me", "AWS_PROFILE": "p", "PYTHONPATH": "x"}
    assert {*session.worker_environment(environment)} == {"FROSTLINE_SIGNING_KEY_FILE", "AWS_PROFILE", "PYTHONPATH"}


def test_without_the_extra_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = session.importlib.util.find_spec
    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    with pytest.raises(ConfigError, match=r"--ray needs ray: uv pip install 'frostline\[ray\]'"):
        session.require_ray()


def test_without_ray_nothing_of_it_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None; sys.argv = ['frostline', *sys.argv[1:]]\n"
        "import atexit; atexit.register(lambda: print([n for n in sys.modules if n in ('pyarrow', 'ray.data')]))\n"
        "from frostline.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "score", "missing.mp4", "--reference", "missing.png"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 2 and result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.mp4", "--reference", "r.png", "--ray", "local"], "--ray needs --out"),
        (["--pairs", "s3://b/pairs.csv"], "--pairs s3://b/pairs.csv: a URL needs --ray"),
        (["a.mp4", "--reference", "r.png", "--out", "s3://b/o.csv"], "--out s3://b/o.csv: a URL needs --ray"),
    ],
)
def test_usage(arguments: list[str], said: str, refused_usage: Callable[..., str]) -> None:
    assert said in refused_usage("score", *arguments)


def test_a_cluster_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert session.sized(ClusterOptions("auto")) == (2, 1.0)
    assert session.sized(ClusterOptions("auto", gpus=0.5)) == (4, 0.5)
    assert session.sized(ClusterOptions("auto", workers=1, gpus=0.0)) == (1, 0.0)
    assert session.sized(ClusterOptions("auto", cpus=2.0, gpus=0.0)) == (4, 0.0)
    with pytest.raises(ConfigError, match="the cluster has 8 CPUs and 2 GPUs, but a worker needs 16 and 1"):
        session.sized(ClusterOptions("auto", cpus=16.0))
