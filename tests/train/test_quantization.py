"""Runs with frozen weights in 8 or 4 bits: gradients, engines, caches, plan, resuming, adapters, sampling."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from adapter_files import make_adapter
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from frostline.cli import app
from frostline.config import LoraSettings, QuantizationSettings
from frostline.errors import ConfigError
from frostline.export.export_cache import receipt_key
from frostline.export.recipe import Recipe
from frostline.models.checkpoints.checkpoint_files import find_files
from frostline.models.checkpoints.loading import load_components
from frostline.models.lora import read_adapter
from frostline.models.lora.inject import lora_layers
from frostline.models.lora.merging import merge_adapter
from frostline.models.quantization.linear import QuantisedLinear, quantised_layers
from frostline.models.quantization.storage import FORMATS
from frostline.models.tiny.clips import held_out_clips
from frostline.models.video_shape import VideoShape
from frostline.progress import Progress
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.identity.fingerprint import stage_key, weights_sha256
from frostline.stages.families import family_of
from frostline.train import TrainingModule
from frostline.train.launch import run_training
from frostline.train.loop.sharding import shard_frozen_weights
from frostline.train.memory.plan import MemoryPlan, memory_plan
from frostline.train.run_plan import RunPlanner
from frostline.train.sample import load_for_sampling
from frostline.train.sample_settings import SampleSettings
from frostline.train.settings import RunSettings
from frostline.train.step_settings import TrainingModuleSettings
from frostline.video import write_video

KINDS = [*FORMATS]
STEP: dict[str, Any] = {
    **{"num_inference_steps": 3, "grad_start_step": 1, "grad_end_step": 2, "lora": {"rank": 4}},
    **{"rewards": [{"type": "sharpness", "baseline": 0, "scale": 1}], "gradient_checkpointing": "none"},
}


def module_of(kind: str, **options: Any) -> TrainingModule:
    torch.manual_seed(0)
    given = {"engines": None, "plan": "torch", "quantization": kind, "text_encoder_quantization": kind, **STEP}
    return TrainingModule.from_pretrained(options.pop("model", "tiny"), **{**given, **options})


def spread(module: TrainingModule) -> None:
    """Make the LoRA change the outputs."""
    with torch.no_grad():
        for index, parameter in enumerate(module.trainable_parameters().values()):
            parameter.copy_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))


def step(module: TrainingModule) -> tuple[Tensor, dict[str, Tensor]]:
    clips = held_out_clips(1, seed=2, num_frames=5, size=32)
    loss, _, kl = module({"prompt": clips.prompts, "video": clips.video})
    loss.backward()
    return torch.stack([loss.detach(), kl.detach()]), {
        name: p.grad for name, p in module.trainable_parameters().items() if p.grad is not None
    }


def dequantise(module: TrainingModule) -> None:
    """Replace the quantised layers by ordinary ones with the stored values, with PyTorch's operations only."""
    module.stages["text_encoder"].restore_weights()
    for network in (module.components.denoiser, module.components.text_encoder):
        for path, layer in quantised_layers(network).items():
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            codes, scale = layer.codes.data, layer.scale.data
            if layer.kind == "nf4":
                levels = torch.tensor([*_LEVELS])
                codes = torch.stack([levels[(codes >> 4).long()], levels[(codes & 15).long()]], -1).flatten(1)
            elif layer.kind == "fp8":
                codes = codes.view(torch.float8_e4m3fn)
            values = (codes.float() * scale).reshape(layer.out_features, layer.in_features)
            plain.weight = nn.Parameter(values, requires_grad=False)
            if layer.bias is not None:
                plain.bias = layer.bias
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, plain)


_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_dequantised_model(kind: str) -> None:
    found, expected = module_of(kind), module_of(kind)
    dequantise(expected)
    assert not quantised_layers(expected.components.denoiser)
    for module in (found, expected):
        spread(module)
    (losses, gradients), (other_losses, other_gradients) = step(found), step(expected)
    assert losses.tolist() == other_losses.tolist()
    assert len(gradients) == len(other_gradients) > 0
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
    plain = module_of("none")
    spread(plain)
    assert step(plain)[0].tolist() != losses.tolist()


@pytest.mark.parametrize("recompute", ["block", "full"])
def test_what_is_recomputed_is_the_same(recompute: str) -> None:
    results = []
    for kind in ("none", recompute):
        module = module_of("nf4", gradient_checkpointing=kind)
        spread(module)
        results.append(step(module))
    # With recomputation, the decoder runs chunk by chunk, which rounds differently.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-3, atol=1e-5)


def test_each_way_to_store_is_another_model() -> None:
    """Use different keys for engines, the frozen-output cache and records of exports."""
    keys = set()
    for kind in ("none", *KINDS):
        stages = module_of(kind).stages
        for name in ("denoiser", "text_encoder"):
            digest = weights_sha256(stages[name])
            keys.add((name, digest, stage_key(stages[name], "onnxruntime", "fp32", digest)))
        recipe = Recipe.parse({"model": "tiny", "quantization": kind})
        keys.add(("receipt", receipt_key(recipe, BuildOptions(), "cpu", {})))
    assert len(keys) == 3 * 4
    module = module_of("int8")
    before = weights_sha256(module.stages["denoiser"])
    next(iter(quantised_layers(module.components.denoiser).values())).codes.data[0, 0] += 1
    assert weights_sha256(module.stages["denoiser"]) != before
    assert weights_sha256(module.stages["vae_decoder"]) == weights_sha256(module_of("nf4").stages["vae_decoder"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_has_the_numbers_of_pytorch(kind: str, tmp_path: Path) -> None:
    """Export both stages with the dequantised weights; a model without quantization does not use these engines."""
    store = tmp_path / "engines"
    arguments = ["export", "tiny", "--stages", "denoiser,text_encoder", "--engines-dir", str(store), "--jobs", "1"]
    arguments += ["--quantization", kind, "--text-encoder-quantization", kind, "--device", "cpu"]
    exported = CliRunner().invoke(app, arguments)
    assert exported.exit_code == 0, exported.output
    names = ("denoiser", "text_encoder")
    served = module_of(kind, engines=store, plan="onnxruntime")
    assert [served.runtime.plan[name].backend for name in names] == ["onnxruntime"] * 2
    in_torch = module_of(kind)
    for module in (served, in_torch):
        spread(module)
    (losses, gradients), (other_losses, other_gradients) = step(served), step(in_torch)
    torch.testing.assert_close(losses, other_losses, rtol=1e-3, atol=1e-5)
    for name, gradient in gradients.items():
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), other_gradients[name].flatten(), 0) > 0.999
    other = module_of("none", engines=store, plan="auto")
    assert [other.runtime.plan[name].backend for name in names] == ["torch"] * 2


def plan(kind: str, model: str = "tiny-moe", **options: Any) -> MemoryPlan:
    settings = TrainingModuleSettings.parse(STEP)
    quantization = QuantizationSettings.parse({"quantization": kind, "text_encoder_quantization": kind})
    return memory_plan(model, settings, VideoShape(1, 5, 32, 32), quantization=quantization, **options)


def stage(made: MemoryPlan, name: str) -> Any:
    return next(each for each in made.stages if each.stage == name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_has_the_sizes_of_a_loaded_model(kind: str) -> None:
    made, none = plan(kind), plan("none")
    storage = dict.fromkeys(("denoiser", "denoiser_high_noise", "text_encoder"), kind)
    components = load_components("tiny-moe", torch.bfloat16, storage=storage)
    for name, module in components.modules():
        if name != "vae":
            assert stage(made, name).weights == sum(parameter.nbytes for parameter in module.parameters())
    for name in storage:
        assert stage(made, name).weights < stage(none, name).weights
        assert stage(made, name).kept == stage(none, name).kept, "backward keeps no dequantised weight"
    assert made.adapter == none.adapter
    served, plain = plan(kind, engines="all"), plan("none", engines="all")
    for name in ("denoiser_high_noise", "text_encoder"):
        assert stage(served, name).weights == 0
        assert stage(served, name).engine == stage(plain, name).engine == stage(none, name).weights


def test_the_dry_run_plans_it(workplace: Path, refused_usage: Callable[..., str]) -> None:
    resident = {}
    for kind in ("none", "nf4"):
        settings = RunSettings.parse(values(kind, plan={"backend": "torch"}))
        resident[kind] = RunPlanner(settings, None, on_cpu=True).plan(settings).resident
    assert resident["nf4"] < resident["none"]
    result = CliRunner().invoke(app, ["train", "config.yaml", "memory.device_gb=0.001", "--dry-run"])
    assert result.exit_code == 1
    assert "quantization=nf4" in result.output
    said = refused_usage("train", "config.yaml", "quantization=int4", "--dry-run")
    assert "quantization: Input should be 'none', 'int8', 'fp8' or 'nf4'" in said


def test_a_14b_model_takes_half_and_a_quarter() -> None:
    family, sizes = family_of("Wan2.2-I2V-A14B"), []
    spec = family.read_spec("Wan2.2-I2V-A14B")
    for kind in ("none", "int8", "nf4"):
        quantization = QuantizationSettings.parse({"quantization": kind})
        model = family.empty_model(spec, torch.bfloat16, LoraSettings(), quantization)
        sizes.append(sum(parameter.nbytes for parameter in model.stage_parameters()["denoiser"]))
    assert sizes[1] == pytest.approx(0.51 * sizes[0], rel=0.02)
    assert sizes[2] == pytest.approx(0.29 * sizes[0], rel=0.03)


def test_sharding_is_refused(workplace: Path) -> None:
    changes = ["quantization=int8", "memory.num_processes=2", "memory.sharding=fsdp"]
    result = CliRunner().invoke(app, ["train", "config.yaml", *changes, "--dry-run"])
    assert result.exit_code == 1
    assert "quantization: weights in 8 or 4 bits cannot be sharded" in result.output
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    with pytest.raises(ConfigError, match="cannot be sharded"):
        shard_frozen_weights(module_of("int8"), accelerator)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the data of two clips and a configuration file; return the folder."""
    clips = held_out_clips(2, seed=2, num_frames=5, size=32)
    rows = []
    for index in range(2):
        write_video(tmp_path / "data" / f"{index}.mp4", clips.video[index], lossless=True)
        rows.append(json.dumps({"video": f"{index}.mp4", "prompt": clips.prompts[index]}))
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "config.yaml").write_text(json.dumps(values("none")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def values(kind: str, **changes: Any) -> dict[str, Any]:
    return {
        **{"model": "tiny", "device": "cpu", "output_dir": "run", "plan": {"backend": "torch"}, **STEP},
        **{"quantization": kind, "text_encoder_quantization": kind},
        "data": {"source": "data/metadata.jsonl", "num_frames": 5},
        "train": {"learning_rate": 1e-3, "max_train_steps": 2, "checkpointing_steps": 1, "mixed_precision": "bf16"},
        **changes,
    }


def left_by(folder: str) -> tuple[list[Any], dict[str, Tensor]]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    kept = [
        {name: value for name, value in line.items() if name not in ("seconds", "stages", "peak_memory_gb")}
        for line in lines
    ]
    return kept, load_file(Path(folder, "adapter", "adapter_model.safetensors"))


@pytest.fixture
def in_bf16() -> Iterator[None]:
    """Reset accelerate, which keeps the precision of a process; other tests use another one."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("in_bf16")
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_equal_to_the_bit(kind: str, workplace: Path, refused_usage: Callable[..., str]) -> None:
    run_training(RunSettings.parse(values(kind)), None, Progress(quiet=True))
    short = values(kind, output_dir="other")
    run_training(
        RunSettings.parse({**short, "train": {**short["train"], "max_train_steps": 1}}), None, Progress(quiet=True)
    )
    assert run_training(RunSettings.parse(short), "latest", Progress(quiet=True)).step == 2
    (lines, adapter), (other_lines, other_adapter) = left_by("run"), left_by("other")
    assert len(lines) == 2
    assert lines == other_lines
    assert adapter.keys() == other_adapter.keys()
    assert all(torch.equal(tensor, other_adapter[name]) for name, tensor in adapter.items())
    for name in ("quantization", "text_encoder_quantization"):
        (workplace / "config.yaml").write_text(json.dumps({**values(kind), name: "none"}))
        said = refused_usage("train", "config.yaml", "--resume", "latest")
        assert f"{name}: the adapter in run/checkpoint-2 was trained with {kind}, not with none" in said


@pytest.mark.parametrize("kind", KINDS)
def test_base_adapters_are_merged_before_weights_are_quantised(kind: str, tmp_path: Path) -> None:
    _, adapter = make_adapter(tmp_path / "adapter", 2, rank=2)
    path = tmp_path / "adapter"
    module = module_of(kind, base_adapters=[{"path": str(path)}])
    expected = merge_adapter(find_files("tiny").networks["denoiser"].read_exact(), read_adapter(path))
    changed = 0
    unmerged = quantised_layers(load_components("tiny", storage={"denoiser": kind}).denoiser)
    for name, layer in quantised_layers(module.components.denoiser).items():
        plain = name.replace(".base_layer", "")
        codes, scale = FORMATS[kind].quantise(expected[f"{plain}.weight"].float())
        assert torch.equal(layer.codes, codes) and torch.equal(layer.scale, scale)
        changed += not torch.equal(layer.codes, unmerged[plain].codes)
    assert changed >= len(adapter.layers) // 2


def test_a_lora_is_not_merged_into_quantised_weights() -> None:
    module = module_of("int8")
    layers = lora_layers(module.components.denoiser)
    assert all(isinstance(layer.base_layer, QuantisedLinear) for layer in layers)
    with pytest.raises(ConfigError, match="frostline adapter merge"):
        layers[0].merge()


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_is_that_of_training(kind: str) -> None:
    common: dict[str, Any] = {"prompt": "p", "height": 32, "width": 32, "num_frames": 5, "device": "cpu"}
    common |= {"model": "tiny", "plan": "torch", "engines": None, "num_inference_steps": 3, "shift": 5.0}
    stored = {"quantization": kind, "text_encoder_quantization": kind}
    sampled, plain = (load_for_sampling(SampleSettings.parse({**common, **how}), {}) for how in (stored, {}))
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    data = {"prompt": ["p"], "video": torch.full((1, 5, 3, 32, 32), 0.5)}
    trained = module_of(kind, shift=5.0)
    clips = [module.generate(module.forward_preprocess(data), noise) for module in (sampled, trained, plain)]
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])
