"""The frozen-output cache: round trips, damage, size limits, several processes, and failing disks."""

import errno
import math
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from frostline.runtime.cache import FrozenOutputCache, content_key

fork = multiprocessing.get_context("fork")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
MIB = 2**20


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    data = draw(st.binary(min_size=math.prod(shape) * dtype.itemsize, max_size=math.prod(shape) * dtype.itemsize))
    if not data:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return (flat % 2 if dtype is torch.bool else flat).view(dtype).reshape(shape)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return content_key(tensors=left) == content_key(tensors=right)


def ones(mebibytes: float, value: float = 1.0) -> dict[str, Tensor]:
    return {"x": torch.full((int(mebibytes * MIB / 4),), value)}


def disk_bytes(root: Path) -> int:
    return sum(file.stat().st_size for file in root.iterdir())


@given(
    st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), tensors(), max_size=3)
)
@settings(max_examples=100, deadline=None)
def test_tensors_come_back_bit_for_bit(entry: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        FrozenOutputCache(root, MIB).put("key", entry)
        fresh = FrozenOutputCache(root, MIB)
        for cached in (fresh.get("key"), fresh.get("key")):  # from the disk, then from memory
            assert cached is not None
            assert same(cached, entry)
            assert {name: (t.dtype, t.shape) for name, t in cached.items()} == {
                name: (t.dtype, t.shape) for name, t in entry.items()
            }


@given(tensors())
@settings(max_examples=50, deadline=None)
def test_the_key_of_a_tensor_is_its_content(tensor: Tensor) -> None:
    assert content_key(x=tensor) == content_key(x=tensor.clone())
    assert content_key(x=tensor) != content_key(x=tensor[None])
    assert content_key(x=tensor) == content_key(x=tensor[None].expand(3, *tensor.shape)[1])


def test_different_parts_have_different_keys() -> None:
    values = [
        *(None, True, 1, 1.0, "1", b"1", [1], [[1]], [], {}, {"a": 1}, {"a": [1]}, "", b"", ["a", "b"], ["ab"]),
        *(torch.tensor(1), torch.tensor(1.0), torch.tensor([1]), torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(0)),
    ]
    assert len({content_key(x=value) for value in values}) == len(values)
    assert content_key(x=1) != content_key(y=1)


def test_keys_are_canonical() -> None:
    assert content_key(a=1, b=2) == content_key(b=2, a=1)
    assert content_key(x={"a": [1, None], "b": 2}) == content_key(x={"b": 2, "a": (1, None)})
    assert content_key(x=torch.ones(2, 3).T) == content_key(x=torch.ones(3, 2))
    assert content_key(x=torch.ones(2, requires_grad=True)) == content_key(x=torch.ones(2))


@pytest.mark.parametrize("part", [object(), {1: 2}, {"a", "b"}, Path("x"), torch.float32, [object()], {"a": object()}])
def test_other_parts_have_no_key(part: object) -> None:
    with pytest.raises(TypeError, match="cannot make a cache key"):
        content_key(x=part)


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "cache" if request.param == "disk" else None


def test_computed_once_and_counted(root: Path | None) -> None:
    cache = FrozenOutputCache(root, MIB)
    calls = []

    def compute() -> dict[str, Tensor]:
        calls.append(1)
        return {"y": torch.ones(2, requires_grad=True) * 2}

    first, second = cache.get_or_compute("key", compute), cache.get_or_compute("key", compute)
    assert same(first, second)
    assert not first["y"].requires_grad
    assert len(calls) == 1
    assert (cache.hits, cache.misses, cache.corrupted) == (1, 1, 0)


def test_entries_belong_to_the_cache_and_copies_to_the_caller(root: Path | None) -> None:
    cache = FrozenOutputCache(root, MIB)
    entry = {"x": torch.ones(4), "view": torch.ones(2, 2).T}
    entry["alias"] = entry["x"]
    cache.put("key", entry)
    entry["x"].zero_()
    copy = cache.get("key")
    assert copy is not None
    copy["x"].fill_(7)
    again = cache.get("key")
    assert again is not None
    assert again["x"].tolist() == again["alias"].tolist() == [1, 1, 1, 1]


def test_an_entry_larger_than_the_cache_displaces_nothing(root: Path | None) -> None:
    cache = FrozenOutputCache(root, MIB)
    cache.put("small", ones(0.1))
    cache.put("large", ones(2))
    assert cache.get("large") is None
    assert cache.get("small") is not None


def test_the_least_recently_used_is_forgotten(root: Path | None) -> None:
    cache = FrozenOutputCache(root, MIB)
    for key in ("a", "b", "c"):
        cache.put(key, ones(0.3))
        time.sleep(0.02)  # file times are coarse
    assert cache.get("a") is not None
    time.sleep(0.02)
    cache.put("d", ones(0.3))
    reopened = cache if root is None else FrozenOutputCache(root, MIB)
    assert [key for key in "abcd" if reopened.get(key) is not None] == ["a", "c", "d"]
    if root:
        assert disk_bytes(root) <= MIB


def test_any_damage_is_noticed_and_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = {"x": torch.arange(6.0), "mask": torch.tensor([True, False])}
    FrozenOutputCache(tmp_path, MIB).put("key", entry)
    file = tmp_path / "key.safetensors"
    original = file.read_bytes()
    flips = [bytes([*original[:i], original[i] ^ 0x10, *original[i + 1 :]]) for i in range(len(original))]
    cuts = [original[:length] for length in range(0, len(original), 7)]
    for damaged in [*flips, *cuts, original + b"\0"]:
        file.write_bytes(damaged)
        cache = FrozenOutputCache(tmp_path, MIB)
        caplog.clear()
        assert same(cache.get_or_compute("key", lambda: entry), entry)
        if told := caplog.text.count("is damaged") + caplog.text.count("not signed with your key"):
            assert told == 1
            assert cache.corrupted == caplog.text.count("is damaged")
            assert file.read_bytes() == original
        else:
            # Padding of the header is the only part that may change without changing the content.
            assert damaged[8:].split(b"}}", 1)[0] == original[8:].split(b"}}", 1)[0]


def test_what_another_key_signed_is_computed_again_with_one_line(
    tmp_path: Path, signing_key: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "cache"
    for name in "abc":
        FrozenOutputCache(root, MIB).put(name, ones(0.01))
    own = {file: file.read_bytes() for file in root.iterdir()}
    signing_key.unlink()
    cache = FrozenOutputCache(root, MIB)
    for name in "abc":
        assert same(cache.get_or_compute(name, lambda: ones(0.01, 2.0)), ones(0.01, 2.0))
    assert (cache.hits, cache.misses, cache.corrupted) == (0, 3, 0)
    assert caplog.text.count("not signed with your key") == 1
    assert str(signing_key) in caplog.text
    assert all(file.read_bytes() != content for file, content in own.items())
    again = FrozenOutputCache(root, MIB)
    assert same(again.get("a") or {}, ones(0.01, 2.0))


def test_an_altered_entry_with_a_digest_that_fits_is_not_believed(tmp_path: Path) -> None:
    FrozenOutputCache(tmp_path, MIB).put("key", ones(0.01))
    file, altered = tmp_path / "key.safetensors", ones(0.01, 3.0)
    with safetensors.safe_open(file, "pt") as entry:
        signature = entry.metadata()["seal"].split()[1]
    for stated in ("", signature, "é"):
        digest = content_key(key="key", tensors=altered)
        safetensors.torch.save_file(altered, file, metadata={"seal": f"{digest} {stated}"})
        assert FrozenOutputCache(tmp_path, MIB).get("key") is None


def test_without_a_key_nothing_is_kept_on_disk_and_nothing_lost(
    tmp_path: Path, signing_key: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FrozenOutputCache(tmp_path, MIB).put("key", ones(0.01))
    content = (tmp_path / "key.safetensors").read_bytes()
    signing_key.chmod(0o644)
    cache = FrozenOutputCache(tmp_path, MIB)
    assert cache.get("key") is None
    assert same(cache.get_or_compute("other", lambda: ones(0.01)), ones(0.01))
    assert caplog.text.count("new entries are kept in memory only") == 1
    assert f"chmod 600 {signing_key}" in caplog.text
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["key.safetensors"]
    signing_key.chmod(0o600)
    assert (tmp_path / "key.safetensors").read_bytes() == content
    assert FrozenOutputCache(tmp_path, MIB).get("key") is not None


def test_only_regular_files_of_a_size_that_fits_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    cache = FrozenOutputCache(tmp_path, MIB)
    assert cache.get("pipe") is None
    FrozenOutputCache(tmp_path, 4 * MIB).put("large", ones(2))
    assert cache.get("large") is None
    assert cache.corrupted == 0
    assert (tmp_path / "large.safetensors").exists()
    assert same(cache.get_or_compute("pipe", lambda: ones(0.01)), ones(0.01))
    assert (tmp_path / "pipe.safetensors").is_file()


def test_an_entry_under_another_key_is_damage(tmp_path: Path) -> None:
    FrozenOutputCache(tmp_path, MIB).put("one", ones(0.01))
    (tmp_path / "one.safetensors").rename(tmp_path / "two.safetensors")
    cache = FrozenOutputCache(tmp_path, MIB)
    assert cache.get("two") is None
    assert (cache.hits, cache.misses, cache.corrupted) == (0, 1, 1)


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    FrozenOutputCache(tmp_path, MIB).put("key", ones(0.01))
    assert same(safetensors.torch.load_file(tmp_path / "key.safetensors"), ones(0.01))


def test_a_folder_that_cannot_be_written_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = FrozenOutputCache(tmp_path / "file" / "cache", MIB)
    for key in "abc":
        assert same(cache.get_or_compute(key, lambda: ones(0.01)), ones(0.01))
        assert cache.get(key) is not None  # the entry is still in memory
    assert caplog.text.count("new entries are kept in memory only") == 1


def test_a_full_disk_warns_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    cache = FrozenOutputCache(tmp_path / "cache", MIB)
    for key in "abc":
        cache.put(key, ones(0.01))
    assert caplog.text.count("new entries are kept in memory only") == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_dead_writers_left_is_swept(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".a.1.part", tmp_path / ".b.2.part"
    dead.touch()
    alive.touch()
    os.utime(dead, (0, 0))
    FrozenOutputCache(tmp_path, MIB).put("key", ones(0.01))
    assert not dead.exists()
    assert alive.exists()


@pytest.mark.fresh_process
def test_a_batch_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    """Kill a writer before it moves one of its files into place: the next reader finds all rows of a batch or none."""
    rows = {key: ones(0.01, value) for value, key in enumerate("abc")}

    def write_and_die(root: Path, moves: int) -> None:
        replace = Path.replace

        def counted(path: Path, target: Path) -> Path:
            nonlocal moves
            if moves == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            moves -= 1
            return replace(path, target)

        Path.replace = counted  # type: ignore[method-assign]
        FrozenOutputCache(root, MIB).put_batch(rows)

    there = []
    for moves in range(6):
        root = tmp_path / str(moves)
        process = fork.Process(target=write_and_die, args=(root, moves))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if moves < 4 else 0)
        cache = FrozenOutputCache(root, MIB)
        kept = {key: cache.get(key) for key in rows}
        there.append(sum(entry is not None for entry in kept.values()))
        assert all(entry is None or same(entry, rows[key]) for key, entry in kept.items())
        assert not list(root.glob("*.batch"))
    assert there == [0, 3, 3, 3, 3, 3]


def test_what_an_unfinished_batch_left_is_swept(tmp_path: Path) -> None:
    dead = tmp_path / ".a.part"
    dead.mkdir()
    (dead / "a.safetensors").touch()
    os.utime(dead, (0, 0))
    FrozenOutputCache(tmp_path, MIB).put("key", ones(0.01))
    assert not dead.exists()


@pytest.mark.fresh_process
def test_several_processes_share_one_folder(tmp_path: Path) -> None:
    values = {content_key(value=value): float(value) for value in range(12)}
    root = tmp_path / "cache"

    def work(seed: int) -> None:
        order = sorted(values, key=lambda key: hash((seed, key)))
        for _ in range(4):
            cache = FrozenOutputCache(root, MIB)
            for key in order:
                entry = cache.get_or_compute(key, lambda key=key: ones(0.15, values[key]))
                assert (entry["x"] == values[key]).all()
            assert cache.corrupted == 0

    processes = [fork.Process(target=work, args=(seed,)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert disk_bytes(root) <= MIB
    assert all(file.suffix == ".safetensors" for file in root.iterdir())
