"""Rewards that compare frames with the prompt, tested against plain scripts that use transformers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTokenizer

from frostline.errors import ConfigError
from frostline.rewards.active import ActiveReward
from frostline.rewards.config import RewardEntry
from frostline.rewards.inputs import RewardInputs
from frostline.runtime.runtime import Runtime

Build = Callable[..., tuple[ActiveReward, Runtime]]

PROMPTS = ("a person on persons", "Cats & cat")
NAMES = ("clip", "pickscore", "hpsv2")


def plain_scores(name: str, model: Any, tokenizer: Any, pixels: Tensor) -> Tensor:
    """Return the scores that the script of each project computes; `pixels` is (B, T, 3, S, S)."""
    scores = []
    for prompt, prepared in zip(PROMPTS, pixels, strict=True):
        ids = tokenizer([prompt], return_tensors="pt")["input_ids"]
        outputs = model(input_ids=ids, pixel_values=prepared)
        logits = outputs.image_embeds @ outputs.text_embeds.T
        if name != "hpsv2":
            torch.testing.assert_close(model.logit_scale.exp() * logits, outputs.logits_per_image)
            logits = outputs.logits_per_image
        scores.append(logits.mean())
    return torch.stack(scores)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient(name: str, build_alone: Build, vision_files: dict[str, Any], video: Tensor) -> None:
    active, runtime = build_alone(name)
    model = vision_files["models"][name]
    folder = Path(vision_files[name]["weights"])
    tokenizer = CLIPTokenizer.from_pretrained(folder if folder.is_dir() else folder.parent)
    sample = RewardInputs(PROMPTS, video, (5, 5))
    references = active.references(sample, runtime)
    assert references["text"].shape[0] == 2
    gradients = []
    for frames in (video.clone().requires_grad_(), video.clone().requires_grad_()):
        if not gradients:
            scored = active.score(frames, sample, references, runtime)
            assert scored.valid.all()
            score = scored.score
        else:
            pixels = active.reward.prepare(frames[:, 1:].flatten(0, 1)).unflatten(0, (2, 4))  # type: ignore[attr-defined]
            expected = plain_scores(name, model, tokenizer, pixels)
            torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-5)
            score = expected
        score.sum().backward()
        assert frames.grad is not None
        gradients.append(frames.grad)
    assert F.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0) >= 0.99999
    assert gradients[0][:, 1:].abs().amax(dim=(2, 3, 4)).min() > 0
    assert gradients[0][:, 0].abs().max() == 0, "the first frame is given, so it has no gradient"
    # Without a gradient, the image tower runs as a stage.
    with torch.no_grad(), runtime.clock.collect() as times:
        frozen = active.score(video, sample, references, runtime)
    torch.testing.assert_close(frozen.score, expected, atol=1e-4, rtol=1e-5)
    assert frozen.frame_scores is not None
    assert frozen.frame_scores.shape == (2, 4)
    torch.testing.assert_close(frozen.frame_scores.mean(dim=1), frozen.score)
    assert {*times.read()} == {f"{name}_image"}
    other = RewardInputs(PROMPTS[::-1], video, (5, 5))
    changed = active.score(video, other, active.references(other, runtime), runtime).score
    assert (changed - expected).abs().min() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_the_whole_script(name: str, build_alone: Build, vision_files: dict[str, Any], video: Tensor) -> None:
    """Process pictures with the library's own processor; only a few pixels are rounded differently."""
    active, runtime = build_alone(name)
    folder = vision_files[name]["weights"]
    processor, tokenizer = CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    pictures = list((video[:, 1:].flatten(0, 1) * 255).round().byte())
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].unflatten(0, (2, 4))
    expected = plain_scores(name, vision_files["models"][name], tokenizer, pixels)
    sample = RewardInputs(PROMPTS, video, (5, 5))
    actual = active.score(video, sample, active.references(sample, runtime), runtime).score
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0)  # 2e-4 of the cosine


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_name_no_weights_say_what_to_download(name: str, tmp_path: Path) -> None:
    published = {"clip": "openai/clip-vit-large-patch14", "pickscore": "PickScore_v1", "hpsv2": "xswu/HPSv2"}[name]
    with pytest.raises(ConfigError, match=rf"the reward {name} needs weights: download .*{published}"):
        RewardEntry.parse({"type": name}).build()  # type: ignore[attr-defined]
    entry = RewardEntry.parse({"type": name, "weights": str(tmp_path / "gone")})
    with pytest.raises(ConfigError, match=rf"gone: no such file or folder; download .*{published}"):
        entry.build()  # type: ignore[attr-defined]


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    entry = RewardEntry.parse({"type": "hpsv2", "weights": "~/hps.pt", "processor": "~/clip"})
    assert entry.weights == tmp_path / "hps.pt"  # type: ignore[attr-defined]
    assert entry.processor == tmp_path / "clip"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"the reward hpsv2 to its path"):
        entry.build()  # type: ignore[attr-defined]


def test_another_processor(build_alone: Build, vision_files: dict[str, Any], tmp_path: Path) -> None:
    weights = Path(vision_files["hpsv2"]["weights"])
    shutil.copy(weights, tmp_path / "hps.pt")
    with pytest.raises(ConfigError, match=r"has no tokenizer; a CLIP folder contains vocab\.json and merges\.txt"):
        build_alone("hpsv2", weights=str(tmp_path / "hps.pt"))
    active, _ = build_alone("hpsv2", weights=str(tmp_path / "hps.pt"), processor=vision_files["clip"]["weights"])
    assert active.reward.clip.tokens(["a cat"]).shape == (1, 16)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"gone: .* download config\.json, model\.safetensors"):
        build_alone("clip", processor=str(tmp_path / "gone"))


def test_references_count_on_the_files_of_the_processor(build_alone: Build, vision_files: dict[str, Any]) -> None:
    """Do not read texts from the cache that were encoded with another vocabulary under the same path."""
    keys = {build_alone("clip")[0].references_key for _ in range(2)}
    merges = Path(vision_files["clip"]["weights"]) / "merges.txt"
    before = merges.read_text()
    try:
        merges.write_text(before.replace("o n</w>\n", ""))
        keys.add(build_alone("clip")[0].references_key)
    finally:
        merges.write_text(before)
    assert len(keys) == 2


def test_many_frames_and_prompts_are_computed_in_several_calls(build_alone: Build, video: Tensor) -> None:
    active, runtime = build_alone("clip")
    reward: Any = active.reward
    sample = RewardInputs(PROMPTS * 2, video.repeat(2, 4, 1, 1, 1), (20,) * 4)
    expected = active.score(sample.video, sample, active.references(sample, runtime), runtime).score
    reward.at_once, reward.prompts_at_once = 7, 3
    with runtime.clock.collect() as times:
        actual = active.score(sample.video, sample, active.references(sample, runtime), runtime).score
    torch.testing.assert_close(actual, expected)
    counts = {name: time.calls for name, time in times.read().items()}
    assert counts == {"clip_image": 11, "clip_text": 2}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision(precision: str, build_alone: Build, video: Tensor) -> None:
    sample = RewardInputs(PROMPTS, video, (5, 5))
    scores = []
    for own in ("fp32", precision):
        active, runtime = build_alone("hpsv2", precision=own)
        frames = video.clone().requires_grad_()
        scored = active.score(frames, sample, active.references(sample, runtime), runtime)
        scored.score.sum().backward()
        assert scored.score.dtype == torch.float32
        assert frames.grad is not None
        scores.append((scored.score.detach(), frames.grad.flatten()))
        assert {stage.networks[0].weight.dtype for stage in active.stages} == {
            {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[own]
        }
    (expected, gradient), (actual, other) = scores
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0)
    assert F.cosine_similarity(gradient, other, dim=0) > 0.98
