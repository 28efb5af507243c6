"""`frostline sample`: a playable clip, determined by the seed, different with an adapter, and the same on engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import frostline.train.sample as sample_file
from frostline.cli import app
from frostline.errors import ConfigError, DataError
from frostline.models.checkpoints.checkpoint_files import EMBEDDED, EMBEDDED_VIDEO
from frostline.models.lora import read_adapter, write_adapter
from frostline.models.lora.inject import save_adapter
from frostline.models.tiny.clips import NUM_FRAMES, SIZE, held_out_clips
from frostline.runtime.planning.plan import parse_plan
from frostline.train import WanTrainingModule
from frostline.train.sample import SampledClip, load_for_sampling, sample_clip
from frostline.train.sample_settings import SampleSettings
from frostline.video import probe_video, read_video

SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "prompt": "a person nods",
    "num_frames": 9,
    "num_inference_steps": 3,
    "plan": "torch",
    "engines": None,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the first frame of a validation clip, 96×96; return the path."""
    path = tmp_path_factory.mktemp("face") / "face.png"
    pixels = held_out_clips(1, seed=0).video[0, 0]
    Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, make_module: Callable[..., WanTrainingModule]) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    module = make_module(lora={"rank": 4, "alpha": 8})
    assert module.model.lora_config is not None
    save_adapter(module.components.denoiser, module.model.lora_config, folder)
    return folder


def loaded_modules(monkeypatch: pytest.MonkeyPatch) -> list[WanTrainingModule]:
    """Return a list to which each module that is loaded from now on is appended."""
    loaded: list[WanTrainingModule] = []

    def load(*arguments: Any) -> WanTrainingModule:
        loaded.append(load_for_sampling(*arguments))
        return loaded[-1]

    monkeypatch.setattr(sample_file, "load_for_sampling", load)
    return loaded


def clip(face: Path | None, out: Path, **changes: Any) -> SampledClip:
    return sample_clip(SampleSettings.parse({**SETTINGS, "image": face, **changes}), out)


def test_a_clip_that_can_be_played(face: Path, tmp_path: Path) -> None:
    sampled = clip(face, tmp_path / "new" / "clip.mp4", fps=8)
    info = probe_video(tmp_path / "new" / "clip.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (9, 96, 96, 8)
    assert sampled.video.shape == (9, 3, 96, 96)
    assert 0 <= sampled.video.min() <= sampled.video.max() <= 1
    written = read_video(tmp_path / "new" / "clip.mp4").float() / 255
    assert (written - sampled.video).abs().mean() < 0.03
    truth = held_out_clips(1, seed=0).video[0, 0]
    assert (sampled.video[0] - truth).abs().mean() < 0.1, "the clip must start with the picture"
    assert sampled.face_score is not None
    assert 0.2 < sampled.face_score < 1
    assert sampled.detection_rate is not None
    assert sampled.detection_rate > 0.5


@pytest.mark.parametrize("model", EMBEDDED)
def test_an_embedded_model_makes_what_it_was_trained_at(model: str, tmp_path: Path) -> None:
    assert EMBEDDED_VIDEO == (NUM_FRAMES, SIZE, SIZE)
    values = {"model": model, "prompt": "x", "image": "large.png"}
    trained = SampleSettings.parse(values)
    assert (trained.num_frames, trained.height, trained.width) == EMBEDDED_VIDEO
    by_area = SampleSettings.parse({**values, "num_frames": 5, "max_pixels": 2400})
    assert (by_area.num_frames, by_area.height, by_area.width, by_area.max_pixels) == (5, None, None, 2400)
    by_sides = SampleSettings.parse({**values, "height": 48, "width": 80, "max_pixels": None})
    assert (by_sides.num_frames, by_sides.height, by_sides.width) == (9, 48, 80)


def test_another_model_makes_81_frames_of_the_pictures_size() -> None:
    settings = SampleSettings.parse({"model": "Wan2.1-I2V-14B-480P", "prompt": "x", "image": "large.png"})
    assert (settings.num_frames, settings.height, settings.max_pixels) == (81, None, 480 * 832)


def test_a_large_picture_is_cut_to_the_size_of_tiny(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "grey").save(tmp_path / "large.png")
    arguments = ["sample", "tiny", "--image", str(tmp_path / "large.png"), "--prompt", "a person nods"]
    steps = ["--num-inference-steps", "1", "--plan", "torch", "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, *steps, "--out", str(tmp_path / "clip.mp4")])
    assert done.exit_code == 0, done.output
    info = probe_video(tmp_path / "clip.mp4")
    assert (info.frames, info.height, info.width) == EMBEDDED_VIDEO


def test_the_seed_makes_the_clip(face: Path, tmp_path: Path) -> None:
    one, again, other = (clip(face, tmp_path / "clip.mp4", seed=seed).video for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 0.05


def test_the_adapter_changes_it_as_much_as_asked(face: Path, adapter: Path, tmp_path: Path) -> None:
    base = clip(face, tmp_path / "clip.mp4").video
    videos = {s: clip(face, tmp_path / "clip.mp4", adapter=adapter, lora_scale=s).video for s in (0.0, 0.5, 1.0)}
    torch.testing.assert_close(videos[0.0], base, atol=1e-5, rtol=0)
    changed = {scale: (video - base).norm() for scale, video in videos.items()}
    assert 0 < 1.5 * changed[0.5] < 3 * changed[1.0]
    assert changed[1.0] > changed[0.5]


def test_a_strength_that_is_too_large_is_refused(face: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"with a lora_scale of 1e\+39, the LoRA of blocks\.0\..* is not finite"):
        clip(face, tmp_path / "clip.mp4", adapter=adapter, lora_scale=1e39)


def test_differences_of_whole_parameters_are_refused(face: Path, adapter: Path, tmp_path: Path) -> None:
    """Using only the LoRA would omit the other half of a distilled adapter."""
    path = tmp_path / "lora.safetensors"
    write_adapter(read_adapter(adapter), "comfyui", path)
    save_file({**load_file(path), "diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(128)}, path)
    with pytest.raises(ConfigError, match=r"differences of 1 whole parameters .* merge it into the model"):
        clip(face, tmp_path / "clip.mp4", adapter=path)
    assert not (tmp_path / "clip.mp4").exists()


def test_adapters_of_both_experts(face: Path, make_module: Callable[..., WanTrainingModule], tmp_path: Path) -> None:
    """Change the steps of each expert by its adapter; rank, scale and layers of the two adapters may differ."""
    for experts, part, lora in (("high", "high_noise", {"rank": 2}), ("low", "low_noise", {"rank": 4, "alpha": 2})):
        make_module("tiny-moe", lora={**lora, "experts": experts}, lora_spread=0.1).save_adapter(tmp_path / "a" / part)

    def video(**changes: Any) -> Any:
        return clip(face, tmp_path / "clip.mp4", model="tiny-moe", num_frames=5, **changes).video

    base, both = video(), video(adapter=tmp_path / "a")
    assert torch.equal(both, video(adapter=tmp_path / "a", expert="both"))
    high, low = (video(adapter=tmp_path / "a", expert=expert) for expert in ("high", "low"))
    torch.testing.assert_close(high, video(adapter=tmp_path / "a" / "high_noise", expert="high"))
    torch.testing.assert_close(low, video(adapter=tmp_path / "a" / "low_noise"))
    for one, other in ((both, base), (both, high), (both, low), (high, low), (high, base), (low, base)):
        assert (one - other).abs().max() > 1e-3
    module = make_module("tiny-moe", lora={"rank": 4, "experts": "both"}, lora_spread=0)
    with pytest.raises(ConfigError, match="rank 2, not 4"):
        module.load_adapter(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"is for the high-noise expert, but tiny has one expert"):
        clip(face, tmp_path / "clip.mp4", adapter=tmp_path / "a")
    with pytest.raises(ConfigError, match="expert: requires an adapter"):
        clip(face, tmp_path / "clip.mp4", expert="high")


@pytest.mark.parametrize("model", ["tiny-moe", "tiny-ti2v"])
def test_every_variant(model: str, face: Path, tmp_path: Path) -> None:
    assert clip(face, tmp_path / "clip.mp4", model=model, num_frames=5).video.isfinite().all()


def test_engines_make_the_same_clip(face: Path, adapter: Path, engines: Path, tmp_path: Path) -> None:
    changes = {"adapter": adapter, "lora_scale": 0.7}
    expected = clip(face, tmp_path / "clip.mp4", **changes)
    actual = clip(face, tmp_path / "clip.mp4", plan="onnxruntime", engines=engines, strict=True, **changes)
    assert {name for name, choice in actual.plan.items() if choice.backend == "onnxruntime"} == expected.plan.keys()
    torch.testing.assert_close(actual.video, expected.video, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", ["tiny", "tiny-moe"])
def test_offloaded_blocks_make_the_same_clip(
    model: str, face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = clip(face, tmp_path / "clip.mp4", model=model)
    loaded = loaded_modules(monkeypatch)
    # A CPU has no memory of its own, so the command refuses it; the same code copies the weights nevertheless.
    monkeypatch.setattr(sample_file, "check_offload", lambda *_, **__: None)
    actual = clip(face, tmp_path / "clip.mp4", model=model, offload_blocks=1)
    assert torch.equal(actual.video, expected.video)
    (module,) = loaded
    for expert in module.model.experts:
        assert expert.module.offload is not None
        assert [*expert.module.offload.weights()]


@pytest.mark.parametrize("plan", ["torch", "onnxruntime"])
def test_encoders_are_released_before_the_denoiser_runs(
    plan: str, face: Path, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    generate = WanTrainingModule.generate

    def look(module: WanTrainingModule, *inputs: Any) -> torch.Tensor:
        stages = module.stages.items()
        with_weights = {name for name, stage in stages if stage.weights is not None and stage.weights.resident}
        seen.append({*with_weights, *(name for name, _ in stages if (name, plan) in module.runtime._engines)})
        return generate(module, *inputs)

    monkeypatch.setattr(WanTrainingModule, "generate", look)
    with monkeypatch.context() as kept:
        kept.setattr(sample_file, "_release_encoders", lambda module: None)
        expected = clip(face, tmp_path / "clip.mp4", engines=engines, plan=plan, strict=True)
    actual = clip(face, tmp_path / "clip.mp4", engines=engines, plan=plan, strict=True)
    assert torch.equal(actual.video, expected.video)
    before, after = seen
    assert before - after == {"text_encoder", "vae_encoder"}


def test_sizes(face: Path, tmp_path: Path) -> None:
    assert clip(face, tmp_path / "clip.mp4", height=48, width=80, num_frames=1).video.shape == (1, 3, 48, 80)
    assert clip(face, tmp_path / "clip.mp4", max_pixels=2400, num_frames=1).video.shape == (1, 3, 48, 48)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_frames": 8}, "num_frames must be 4k"),
        ({"height": 64}, "height and width must be set together"),
        ({"height": 60, "width": 64}, "height must be a multiple of 16 for tiny, not 60"),
        ({"image": None}, "tiny needs a first frame: use --image"),
        ({"model": "Wan2.1-T2V-1.3B", "image": None}, "without an image, height and width"),
        ({"image": None, "height": 64, "width": 64}, "tiny needs a first frame"),
        ({"plan": "vae_encoder=,x"}, "is neither auto"),
        ({"plan": "vae_coder=torch"}, "there is no stage 'vae_coder'"),
        ({"adapter": Path("nowhere")}, "nowhere contains no adapter"),
        ({"precision": "fp8"}, "precision"),
        ({"prompt": ""}, "prompt"),
        ({"offload_blocks": 1}, "offload_blocks: needs a GPU, because a CPU uses main memory for all weights"),
    ],
)
def test_what_cannot_be_sampled(changes: dict[str, Any], said: str, face: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        clip(**{"face": face, "out": tmp_path / "clip.mp4", **changes})
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_model_is_named(face: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"adapter_model\.safetensors does not match the model: blocks\.2.* is missing"
    ):
        clip(face, tmp_path / "clip.mp4", model="tiny-ti2v", adapter=adapter)


def test_a_picture_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png: no such file"):
        clip(tmp_path / "nowhere.png", tmp_path / "clip.mp4")
    with pytest.raises(ConfigError, match=r"clip\.avi: must be a \.mp4 file"):
        clip(tmp_path / "nowhere.png", tmp_path / "clip.avi")


def test_plans() -> None:
    assert parse_plan("auto") == "auto"
    assert parse_plan("vae_encoder = torch, denoiser=openvino") == {"vae_encoder": "torch", "denoiser": "openvino"}


def test_the_command(face: Path, adapter: Path, tmp_path: Path) -> None:
    arguments = ["--image", str(face), "--adapter", str(adapter), "--prompt", "a person nods", "--num-frames", "5"]
    arguments += ["--num-inference-steps", "2", "--plan", "torch", "--out", str(tmp_path / "clip.mp4"), "--seed", "1"]
    result = CliRunner().invoke(app, ["sample", "tiny", *arguments])
    assert result.exit_code == 0, result.output
    assert "face score" in result.output
    assert probe_video(tmp_path / "clip.mp4").frames == 5
