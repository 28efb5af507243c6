"""After precomputing, a run reads no frozen weights, and is bit for bit like the run without precomputing."""

import io
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_python, run_ranks
from precomputing import precompute_for, run_settings, write_clips, write_model
from rich.console import Console
from safetensors.torch import load, load_file
from typer.testing import CliRunner

import frostline.train.precompute.frozen as frozen_file
from frostline.cli import app
from frostline.documents import dump_yaml
from frostline.errors import ConfigError
from frostline.models.lazy_weights import PartWeights
from frostline.progress import Progress
from frostline.train.config_file import dump_settings
from frostline.train.dry_run import print_dry_run
from frostline.train.launch import run_training
from frostline.train.precompute.preview import count_there

SCRIPT = Path(__file__).parents[2] / "precomputing.py"
TIMES = ("seconds", "stages", "peak_memory_gb")


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a separate user cache folder for this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path_factory.mktemp("digests")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digests: None) -> Path:
    """Create a model, data, a run in `plain` without precomputing, and the precomputed cache of `cached`."""
    folder = tmp_path_factory.mktemp("precompute")
    write_model(folder / "model")
    write_clips(folder / "data")
    run_training(run_settings(folder, "plain", precompute="never"), None, Progress(quiet=True))
    path = folder / "config.yaml"
    path.write_text(dump_yaml(dump_settings(run_settings(folder, "cached"))))
    done = CliRunner().invoke(app, ["cache", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "5 samples and 3 validation samples" in done.output
    return folder


def entries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def lines(path: Path) -> list[str]:
    read = [json.loads(line) for line in path.read_text().splitlines()]
    # Compared as text, so that NaN equals NaN.
    return [json.dumps({name: value for name, value in line.items() if name not in TIMES}) for line in read]


def spoil(path: Path, prefixes: tuple[str, ...] = ("",)) -> None:
    """Fill fp16 tensors of a file with NaN, without changing its size and modification time."""
    status, data = path.stat(), bytearray(path.read_bytes())
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    spoilt = 0
    for name, info in header.items():
        if name != "__metadata__" and name.startswith(prefixes):
            assert info["dtype"] == "F16"
            begin, end = (8 + size + offset for offset in info["data_offsets"])
            data[begin:end] = b"\x00\x7e" * ((end - begin) // 2)
            spoilt += 1
    assert spoilt
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_is_precomputed_is_what_the_run_computes(folder: Path) -> None:
    assert entries(folder / "cached" / "cache") == entries(folder / "plain" / "cache")
    kept = [name for path in (folder / "cached" / "cache").glob("*.safetensors") for name in load_file(path)]
    # Contexts depend on prompts, the others on first frames or clips; validation samples have separate noise.
    assert {name: kept.count(name) for name in ("y", "clip_latents", "latents")} == {
        "y": 5,
        "clip_latents": 5,
        "latents": 5 + 3,
    }


def test_it_is_not_computed_again(folder: Path) -> None:
    assert precompute_for(run_settings(folder, "cached", precompute="always")).computed == 0


def test_a_dry_run_tells_both_phases_and_what_is_there(folder: Path) -> None:
    def page(**others: Any) -> str:
        text = io.StringIO()
        settings = run_settings(folder, "cached", precompute="always", memory={"device_gb": 1.0}, **others)
        print_dry_run(settings, Console(file=text, width=300))
        return text.getvalue()

    shown = page()
    assert "precompute: 8 of 8 samples are already in" in shown
    assert "training does not need text_encoder, vae_encoder, denoiser_high_noise" in shown
    assert "precompute, before the first step, one stage at a time: text_encoder" in shown
    assert "precompute: 0 of 8 samples are already in" in page(cache_dir=folder / "elsewhere")
    assert "precompute: nothing (the frozen outputs need" in page(cache_bytes=1000)


def test_the_dry_run_misses_an_entry(folder: Path) -> None:
    settings = run_settings(folder, "cached", precompute="always")
    validation = None
    data = settings.data.open()
    assert count_there(settings, data, validation) == (5, 5)
    path = next(p for p in (folder / "cached" / "cache").glob("*.safetensors") if "clip_latents" in load_file(p))
    content = path.read_bytes()
    path.unlink()
    assert count_there(settings, data, validation) == (4, 5)
    path.write_bytes(content)


def test_the_estimate_bounds_what_is_kept(folder: Path) -> None:
    done = precompute_for(run_settings(folder, "cached", precompute="always"))
    assert done.estimate is not None
    kept = sum(map(len, entries(folder / "cached" / "cache").values()))
    # The estimate counts an equal prompt twice, and three validation samples that are also training samples.
    assert kept <= done.estimate.nbytes <= 2 * kept


def test_a_damaged_entry_is_computed_again(folder: Path) -> None:
    shutil.copytree(folder / "cached", folder / "damaged")
    path = next(iter((folder / "damaged" / "cache").glob("*.safetensors")))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert precompute_for(run_settings(folder, "damaged", precompute="always")).computed >= 1
    # Computed without the other rows of its batch, so the last bits may differ.
    found, expected = load_file(path), load(content)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_batches_may_be_larger(folder: Path) -> None:
    settings = run_settings(folder, "batched", precompute="always")
    precompute_for(settings, batch_size=4)
    expected, found = entries(folder / "cached" / "cache"), entries(folder / "batched" / "cache")
    assert found.keys() == expected.keys()
    for name in expected:
        one = load_file(folder / "cached" / "cache" / name)
        other = load_file(folder / "batched" / "cache" / name)
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_engines_of_single_stages_are_verified_beforehand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify them first, so that precomputing uses the engines that training will use, and the keys are the same."""
    verified: list[str] = []
    monkeypatch.setattr(frozen_file, "ensure_verified", lambda stages, store: verified.extend(s.name for s in stages))
    for stages, wanted in (({}, False), ({"text_encoder": "onnxruntime"}, True)):
        plan = {"backend": "torch", "stages": stages, "engines": folder / "engines"}
        precompute_for(run_settings(folder, f"verified {wanted}", precompute="always", plan=plan))
        assert ("text_encoder" in verified) == wanted


def test_a_cache_that_is_too_small_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"precompute: always: .* cache_bytes is 1000"):
        precompute_for(run_settings(folder, "small", precompute="always", cache_bytes=1000))
    assert not (folder / "small").exists()


@pytest.mark.parametrize("how", ["auto", "never"])
def test_small_models_are_not_precomputed_unless_asked(how: str, folder: Path) -> None:
    assert precompute_for(run_settings(folder, "none", precompute=how)).stages == frozenset()
    assert not (folder / "none").exists()


def test_fresh_noise_leaves_the_expert_to_training(folder: Path) -> None:
    settings = run_settings(folder, "fresh", precompute="always", noise_seed=None)
    assert precompute_for(settings).stages == {"text_encoder", "vae_encoder"}
    held = [load_file(path).keys() for path in (folder / "fresh" / "cache").glob("*.safetensors")]
    assert not any("latents" in names for names in held)


def test_a_killed_precompute_computes_nothing_twice(folder: Path) -> None:
    done = run_python(str(SCRIPT), str(folder), "0", timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    codes = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert codes.count(-9) >= 8
    put = (folder / "log").read_text().split()
    assert len(put) == len({*put})
    assert entries(folder / "killed" / "cache") == entries(folder / "plain" / "cache")


def test_two_processes_share_the_work(folder: Path) -> None:
    config = folder / "shared.yaml"
    config.write_text(dump_yaml(dump_settings(run_settings(folder, "shared"))))
    run_ranks("-m", "frostline", "cache", str(config), timeout=200)
    assert entries(folder / "shared" / "cache").keys() == entries(folder / "cached" / "cache").keys()
    assert precompute_for(run_settings(folder, "shared", precompute="always")).computed == 0


def test_a_run_reads_no_frozen_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run last in this module: afterwards, frozen weights are NaN, and reading them is refused."""
    spoil(folder / "model" / "models_t5_umt5-xxl-enc.safetensors")
    spoil(folder / "model" / "high_noise_model" / "diffusion_pytorch_model.safetensors")
    spoil(folder / "model" / "Wan2.1_VAE.safetensors", ("encoder.", "conv1."))

    def refuse(weights: PartWeights) -> None:
        raise AssertionError(f"reads {weights.source}")

    monkeypatch.setattr(PartWeights, "restore", refuse)
    run_training(run_settings(folder, "cached", precompute="always"), None, Progress(quiet=True))
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert lines(folder / "cached" / name) == lines(folder / "plain" / name)
    adapter = "adapter/adapter_model.safetensors"
    assert (folder / "cached" / adapter).read_bytes() == (folder / "plain" / adapter).read_bytes()
