"""Adapters that are merged when the model is loaded: results and cache keys are those of a merged model."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import DIFFERENCES, make_adapter, uneven, write_distilled, write_flat
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from frostline.cli import app
from frostline.config import BaseAdapter
from frostline.errors import ConfigError
from frostline.export.export_cache import receipt_key
from frostline.export.recipe import Recipe
from frostline.models.checkpoints.checkpoint_files import find_files
from frostline.models.checkpoints.loading import load_components
from frostline.models.lora import merge_adapter, read_adapter, write_adapter
from frostline.models.tiny.clips import held_out_clips
from frostline.progress import Progress
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.identity.fingerprint import find_engine, stage_key, weights_sha256
from frostline.stages.families import family_of
from frostline.train.launch import run_training
from frostline.train.sample import load_for_sampling
from frostline.train.sample_settings import SampleSettings
from frostline.train.settings import RunSettings
from frostline.train.step.module import TrainingModule
from frostline.video import write_video

CPU = torch.device("cpu")
TINY = Path(load_components.__code__.co_filename).parents[1] / "tiny" / "weights" / "tiny"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the working folder: data, a configuration, a distilled adapter with several ranks, and another adapter."""
    clips = held_out_clips(1, seed=2, num_frames=5, size=32)
    write_video(tmp_path / "data" / "0.mp4", clips.video[0], lossless=True)
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"video": "0.mp4", "prompt": clips.prompts[0]}))
    (tmp_path / "config.yaml").write_text(json.dumps(values()))
    adapter, differences, _ = write_distilled(tmp_path / "made")
    path = tmp_path / "distilled.safetensors"
    write_flat(uneven(adapter), path, "diffusion_model.{}".format, ("lora_down", "lora_up"))
    save_file({**load_file(path), **differences}, path)
    shutil.copytree(tmp_path / "made" / "trained", tmp_path / "peft")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def values(**changes: Any) -> dict[str, Any]:
    return {
        **{"model": "tiny", "device": "cpu", "output_dir": "run"},
        **{"num_inference_steps": 2, "grad_start_step": 1, "grad_end_step": 1},
        "lora": {"rank": 4},
        "plan": {"backend": "torch"},
        "rewards": [{"type": "sharpness"}],
        "data": {"source": "data/metadata.jsonl", "num_frames": 5},
        "train": {"learning_rate": 1e-3, "max_train_steps": 3, "checkpointing_steps": 2},
        **changes,
    }


def adapters(*entries: dict[str, Any]) -> tuple[BaseAdapter, ...]:
    return tuple(BaseAdapter.parse(entry) for entry in entries)


def merged_beforehand(folder: Path, *merges: tuple[str, float]) -> Path:
    """Return a copy of tiny whose denoiser was merged by `frostline adapter merge` with each adapter."""
    model: Path | str = "tiny"
    for number, (adapter, scale) in enumerate(merges):
        out = folder / f"merged-{number}"
        shutil.copytree(TINY, out)
        weights = out / "diffusion_pytorch_model.safetensors"
        weights.unlink()
        command = ["adapter", "merge", str(model), adapter, "--lora-scale", str(scale), "--out", str(weights)]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        model = out
    return Path(model)


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_a_run_is_to_the_bit_that_on_the_merged_model(workplace: Path) -> None:
    merged = merged_beforehand(workplace, ("distilled.safetensors", 1.0), ("peft", 0.5))
    in_memory = [{"path": "distilled.safetensors"}, {"path": "peft", "scale": 0.5}]
    for name, changes in {
        "beforehand": {"model": str(merged)},
        "in_memory": {"base_adapters": in_memory},
        "without": {},
    }.items():
        run_training(RunSettings.parse(values(**changes, output_dir=name)), None, Progress(quiet=True))
    lines = {}
    for name in ("beforehand", "in_memory", "without"):
        steps = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        lines[name] = [
            {k: v for k, v in step.items() if k not in ("seconds", "stages", "peak_memory_gb")} for step in steps
        ]
    assert len(lines["in_memory"]) == 3
    assert lines["in_memory"] == lines["beforehand"]
    assert lines["in_memory"] != lines["without"]
    loras = {name: load_file(Path(name, "adapter", "adapter_model.safetensors")) for name in lines}
    assert all(torch.equal(tensor, loras["beforehand"][name]) for name, tensor in loras["in_memory"].items())
    assert any(not torch.equal(tensor, loras["without"][name]) for name, tensor in loras["in_memory"].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_those_of_the_merged_model(dtype: torch.dtype, workplace: Path) -> None:
    merged = str(merged_beforehand(workplace, ("distilled.safetensors", 1.0), ("peft", 0.5)))
    in_memory = adapters({"path": "distilled.safetensors"}, {"path": "peft", "scale": 0.5})
    expected = family_of(merged).load(merged, dtype, CPU, False).denoiser.state_dict()
    found = family_of("tiny").load("tiny", dtype, CPU, False, base_adapters=in_memory).denoiser.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) and found[name].dtype == dtype for name, weight in expected.items())


def test_an_engine_serves_what_it_was_built_of_alone(workplace: Path) -> None:
    merged = merged_beforehand(workplace, ("distilled.safetensors", 0.25))
    options: dict[str, Any] = {"engines": None, "plan": "torch", "lora": {"rank": 4}}
    one = adapters({"path": "distilled.safetensors", "scale": 0.25})
    modules = {
        "base": TrainingModule.from_pretrained("tiny", **options),
        "beforehand": TrainingModule.from_pretrained(str(merged), **options),
        "in_memory": TrainingModule.from_pretrained("tiny", base_adapters=[one[0].model_dump()], **options),
        "other_scale": TrainingModule.from_pretrained(
            "tiny", base_adapters=[one[0].model_copy(update={"scale": 0.5})], **options
        ),
    }
    keys = {
        (name, stage): stage_key(module.stages[stage], "onnxruntime", "fp32", weights_sha256(module.stages[stage]))
        for name, module in modules.items()
        for stage in ("denoiser", "text_encoder", "vae_decoder")
    }
    for stage in ("text_encoder", "vae_decoder"):
        assert len({keys[name, stage] for name in modules}) == 1, "the adapter must not change this stage"
    assert keys["in_memory", "denoiser"] == keys["beforehand", "denoiser"]
    assert len({keys[name, "denoiser"] for name in modules}) == 3


def test_engines_of_the_base_are_not_found_for_the_merged_model(workplace: Path, engines: Path) -> None:
    store = EngineStore(engines)
    options: dict[str, Any] = {"engines": None, "plan": "torch", "lora": {"rank": 2}}
    for base_adapters, found in (((), True), (adapters({"path": "peft"}), False)):
        stages = TrainingModule.from_pretrained("tiny", base_adapters=base_adapters, **options).stages
        for stage, expected in (("denoiser", found), ("vae_encoder", True)):
            digest = weights_sha256(stages[stage])
            assert (find_engine(store, stages[stage], "onnxruntime", digest) is not None) == expected, stage


def test_weights_that_are_away_come_back_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the high-noise expert again after it was released; its digest is stored for the next run."""
    monkeypatch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path / "cache"))
    path = moe_adapter(tmp_path)
    entry = {"path": str(path), "scale": 0.5, "expert": "high"}
    stored = find_files("tiny-moe").networks["denoiser_high_noise"].read_exact()
    expected = merge_adapter(stored, read_adapter(path), 0.5)
    options: dict[str, Any] = {"engines": None, "plan": "torch", "lora": {"rank": 4}}
    plain = TrainingModule.from_pretrained("tiny-moe", **options)
    digests: dict[tuple[float, ...], str] = {(): weights_sha256(plain.stages["denoiser_high_noise"])}
    low = weights_of(plain.components.denoiser)
    for scale in (0.5, 0.25, 0.5):
        module = TrainingModule.from_pretrained(
            "tiny-moe", base_adapters=adapters({**entry, "scale": scale}), **options
        )
        stage = module.stages["denoiser_high_noise"]
        assert stage.weights is not None and not stage.weights.resident
        digest = weights_sha256(stage)
        assert digests.setdefault((scale,), digest) == digest
    assert len({*digests.values()}) == 3
    assert not stage.weights.resident, "the digest must be read from the cache"
    for _ in range(2):
        stage.weights.restore()
        restored = module.components.denoiser_high_noise.state_dict()
        assert all(torch.equal(restored[name], weight.float()) for name, weight in expected.items())
        assert weights_sha256(stage) == digests[0.5,]
        stage.weights.release()
        assert not stage.weights.resident
    found = weights_of(module.components.denoiser)
    assert all(torch.equal(tensor, low[name]) for name, tensor in found.items() if ".lora_" not in name)
    change(path)
    with pytest.raises(ConfigError, match=r"moe\.safetensors.* changed since it was loaded"):
        stage.weights.restore()
    again = TrainingModule.from_pretrained("tiny-moe", base_adapters=adapters(entry), **options)
    assert weights_sha256(again.stages["denoiser_high_noise"]) not in digests.values()


def test_both_experts_have_their_own(tmp_path: Path) -> None:
    path = moe_adapter(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        plain = load_components("tiny-moe", dtype)
        entries = adapters({"path": str(path), "expert": "low"}, {"path": str(path), "expert": "high", "scale": -1.0})
        both = family_of("tiny-moe").load("tiny-moe", dtype, CPU, False, base_adapters=entries)
        for name, scale in (("denoiser", 1.0), ("denoiser_high_noise", -1.0)):
            files = find_files("tiny-moe").networks[name]
            expected = merge_adapter(files.read_exact(), read_adapter(path), scale)
            found, before = getattr(both, name).state_dict(), getattr(plain, name).state_dict()
            assert all(torch.equal(found[key], weight.to(dtype)) for key, weight in expected.items())
            assert any(not torch.equal(found[key], weight) for key, weight in before.items())


def test_an_export_is_reused_for_the_same_adapter_alone(workplace: Path) -> None:
    def key(*entries: dict[str, Any]) -> str:
        recipe = Recipe(model="tiny", base_adapters=adapters(*entries))
        return receipt_key(recipe, BuildOptions(), "cpu", {})

    one = {"path": "distilled.safetensors"}
    keys = [key(), key(one), key({**one, "scale": 0.5}), key(one, {"path": "peft"})]
    assert len({*keys}) == 4
    assert key(one) == keys[1]
    change(workplace / "distilled.safetensors")
    assert key(one) not in keys
    peft = key({"path": "peft"})
    change(workplace / "peft" / "adapter_model.safetensors")
    assert key({"path": "peft"}) != peft


def test_sampling_is_that_of_the_merged_model(workplace: Path) -> None:
    merged = merged_beforehand(workplace, ("distilled.safetensors", 1.0))
    common: dict[str, Any] = {"prompt": "p", "height": 32, "width": 32, "num_frames": 5, "device": "cpu"}
    common |= {"plan": "torch", "engines": None, "num_inference_steps": 2}
    in_memory = SampleSettings(model="tiny", base_adapters=adapters({"path": "distilled.safetensors"}), **common)
    one, other = (load_for_sampling(s, {}) for s in (in_memory, SampleSettings(model=str(merged), **common)))
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    data = {"prompt": ["p"], "video": torch.full((1, 5, 3, 32, 32), 0.5)}
    assert torch.equal(*(module.generate(module.forward_preprocess(data), noise) for module in (one, other)))


def test_the_dry_run_plans_the_memory_of_the_model_alone(workplace: Path) -> None:
    """Plan no additional memory for merged adapters."""
    pages = [
        CliRunner().invoke(app, ["train", "config.yaml", *changes, "--dry-run"])
        for changes in ([], ["base_adapters=[{path: distilled.safetensors}]"])
    ]
    assert [page.exit_code for page in pages] == [0, 0], pages[1].output
    assert pages[0].output == pages[1].output


def test_resuming_on_other_ones_is_refused(workplace: Path, refused_usage: Callable[..., str]) -> None:
    one = [{"path": "peft", "scale": 0.5}]
    run_training(RunSettings.parse(values(base_adapters=one)), None, Progress(quiet=True))
    for changes in (
        [],
        ["base_adapters=[{path: peft, scale: 0.25}]"],
        ["base_adapters=[{path: distilled.safetensors}]"],
    ):
        said = refused_usage("train", "config.yaml", *changes, "--resume", "latest")
        assert "base_adapters: the adapter in run/checkpoint-3 was trained on" in said
        assert '"path": "peft", "scale": 0.5' in said
    settings = RunSettings.parse(values(base_adapters=one, train={**values()["train"], "max_train_steps": 4}))
    assert run_training(settings, "latest", Progress(quiet=True)).step == 4
    # The same path with other contents.
    weights = workplace / "peft" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    said = refused_usage("train", "config.yaml", "base_adapters=[{path: peft, scale: 0.5}]", "--resume", "latest")
    assert 'base_adapters: a file of [{"path": "peft", "scale": 0.5' in said
    assert "has changed since run/checkpoint-4 was saved" in said


REFUSED = {
    "missing": ("tiny", "nowhere", "nowhere contains no adapter"),
    "other_model": ("tiny-ti2v", "peft", "peft/adapter_model.safetensors does not match the model: blocks.2"),
    "no_expert": ("tiny-moe", "peft", "tiny-moe has two experts: set the expert of peft to low or high"),
    "one_expert": ("tiny", "peft,expert=high", "tiny has one denoiser: remove expert high of peft"),
    "bad_expert": ("tiny", "peft,expert=middle", "expert: Input should be 'low' or 'high'"),
    "bad_scale": ("tiny", "peft,scale=strong", "scale: Input should be a valid number"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("command", ["train", "dry-run", "export", "plan", "sample"])
def test_what_cannot_be_merged_is_refused(
    command: str, case: str, workplace: Path, refused_usage: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("frostline.models.checkpoints.loading.load_components", load)
    model, adapter, said = REFUSED[case]
    path, *changes = adapter.split(",")
    entry = ", ".join([f"path: {path}", *(change.replace("=", ": ") for change in changes)])
    train = ["train", "config.yaml", f"model={model}", f"base_adapters=[{{{entry}}}]"]
    if command == "dry-run":
        result = CliRunner().invoke(app, [*train, "--dry-run"])
        output = " ".join((result.output + str(result.exception)).split())
        assert result.exit_code == 1
        assert said in output
        return
    given = ["--base-adapter", adapter]
    arguments = {
        "train": train,
        "export": ["export", model, *given],
        "plan": ["plan", model, *given],
        "sample": ["sample", model, "--prompt", "p", "--height", "32", "--width", "32", "--out", "x.mp4", *given],
    }[command]
    assert said in refused_usage(*arguments)


def test_an_adapter_that_only_merging_takes_says_so(workplace: Path, refused_usage: Callable[..., str]) -> None:
    said = refused_usage("train", "config.yaml", "--init-adapter", "distilled.safetensors")
    assert f"has differences of {len(DIFFERENCES)} whole parameters" in said
    assert "use base_adapters" in said


def moe_adapter(folder: Path) -> Path:
    """Write an adapter of the layers that both experts of tiny-moe have; return its path."""
    _, adapter = make_adapter(folder / "moe", 6)
    shapes = [find_files("tiny-moe").networks[name].shapes for name in ("denoiser", "denoiser_high_noise")]
    layers = {n: p for n, p in adapter.layers.items() if all(s.get(f"{n}.weight") == p.weight_shape for s in shapes)}
    assert layers
    path = folder / "moe.safetensors"
    write_adapter(replace(adapter, layers=layers), "comfyui", path)
    return path


def change(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, path)
