"""Compare the frames per second of `frostline score` on vision rewards with typical scripts that use transformers.

    python benchmarks/scoring.py --out benchmarks/results/scoring.json

All contenders run alternately in one process, on the same video and with the same number of threads. Their scores are
compared before their times are measured. Each ratio is the median over the rounds of the ratio of two times of the same
round. A script loads a model and a processor of transformers, and iterates over the frames one by one or in batches;
the prompt is encoded once. The networks have the sizes of CLIP ViT-B/32 and DINOv2-small, and random weights, which do
not affect the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import torch
import torch.nn.functional as F
from building import BACKENDS, ENGINES
from faces import clip as make_clip
from faces import take_turns
from measuring import RESULTS, machine, write_result
from PIL import Image
from rich.console import Console
from rich.table import Table
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
)

from frostline.progress import Progress
from frostline.runtime.backends import get_backend
from frostline.score.request import Pair
from frostline.score.rewards.base import ScoredReward
from frostline.score.rewards.loading import load_rewards
from frostline.score.scorer import Scorer
from frostline.score.settings import ScoreSettings
from frostline.video import write_video

_PROMPT = "a portrait of an astronaut who smiles"
_BATCH = 32
_ONE_BY_ONE, _BATCHED = "transformers, frame by frame", "transformers, batches of 32"
_ENGINES, _TORCH = "frostline, engines", "frostline, PyTorch"
# The targets: the minimum ratio of the engines to each contender.
_GOALS = {_ONE_BY_ONE: 1.5, _BATCHED: 1.0, _TORCH: 1.0}


class ClipScript:
    """CLIP, used as in its model card; the score is the mean logit."""

    def __init__(self, folder: Path) -> None:
        self.model = CLIPModel.from_pretrained(folder).eval()
        self.processor: Any = CLIPProcessor.from_pretrained(folder, use_fast=False)
        tokens = self.processor(text=[_PROMPT], return_tensors="pt")
        with torch.no_grad():
            self.text = F.normalize(_features(self.model.get_text_features(**tokens)), dim=-1)

    def see(self, pictures: list[Image.Image]) -> Tensor:
        """Return the unit feature vectors (N, D) of N pictures."""
        inputs = self.processor(images=pictures, return_tensors="pt")
        return F.normalize(_features(self.model.get_image_features(**inputs)), dim=-1)

    def pool(self, features: Tensor) -> float:
        """Return the mean logit of (T, D) features."""
        return float((self.model.logit_scale.exp() * features @ self.text.T).mean())


class ConsistencyScript:
    """DINOv2, used as in VBench's subject consistency."""

    def __init__(self, folder: Path) -> None:
        self.model = Dinov2Model.from_pretrained(folder).eval()
        self.processor: Any = AutoImageProcessor.from_pretrained(folder, use_fast=False)

    def see(self, pictures: list[Image.Image]) -> Tensor:
        """Return the unit feature vectors (N, D) of N pictures."""
        inputs = self.processor(images=pictures, return_tensors="pt")
        return F.normalize(self.model(**inputs).last_hidden_state[:, 0], dim=-1)

    def pool(self, features: Tensor) -> float:
        """Return the mean cosine of each frame with the first and with the previous frame; `features` is (T, D)."""
        first, before = features[1:] @ features[0], (features[1:] * features[:-1]).sum(dim=1)
        return float((first.clamp(min=0) + before.clamp(min=0)).mean() / 2)


Script = ClipScript | ConsistencyScript


@torch.no_grad()
def run_script(script: Script, video: Path, batch: int) -> float:
    """Decode a video, compute the features of `batch` frames at once, and pool them."""
    features, waiting = [], []
    for picture in pictures_of(video):
        waiting.append(picture)
        if len(waiting) == batch:
            features.append(script.see(waiting))
            waiting = []
    if waiting:
        features.append(script.see(waiting))
    return script.pool(torch.cat(features))


def pictures_of(video: Path) -> Iterator[Image.Image]:
    """Yield the frames of a video, decoded with PyAV."""
    with av.open(str(video)) as container:
        for frame in container.decode(video=0):
            yield frame.to_image()


def run_ours(reward: ScoredReward, settings: ScoreSettings, video: Path) -> float:
    """Return the score of a video, computed like `frostline score`, but without the command line."""
    (row,) = Scorer([reward], settings, _BATCH).score([Pair(0, str(video), "", _PROMPT)])
    assert row.status == "ok", row.error
    return row.scores[reward.label]


def write_clip(folder: Path) -> None:
    """Write a CLIP model of the size of ViT-B/32 with random weights, in the layout of transformers."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = {"vocab_size": len(vocabulary), "bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    CLIPModel(CLIPConfig(text_config=text)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    _write_preparation(folder, "CLIPImageProcessor", mean, std, shortest=224)


def write_dinov2(folder: Path) -> None:
    """Write a DINOv2 model of the size of dinov2-small with random weights, in the layout of transformers."""
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    _write_preparation(folder, "BitImageProcessor", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), shortest=256)


_KINDS = {"clip": (write_clip, ClipScript), "subject_consistency": (write_dinov2, ConsistencyScript)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "scoring.json")
    parser.add_argument("--rewards", default=",".join(_KINDS))
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines-dir", type=Path, default=ENGINES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        video = write_video(Path(folder) / "video.mp4", make_clip(arguments.frames, arguments.size), fps=16)
        load_before = os.getloadavg()
        measured = {name: measure(name, arguments, video, Path(folder) / name) for name in arguments.rewards.split(",")}
    result = {
        "command": " ".join(["python", "benchmarks/scoring.py", *sys.argv[1:]]),
        "what": f"{arguments.frames} square frames of {arguments.size} px, {arguments.threads} threads",
        "rewards": measured,
        "machine": {**machine(torch.device("cpu")), "load_before": load_before, "load_after": os.getloadavg()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_result(arguments.out, result)
    print_result(result)


def measure(name: str, arguments: argparse.Namespace, video: Path, folder: Path) -> dict[str, Any]:
    """Compare the scores of all contenders for one reward, then measure their times."""
    write, make_script = _KINDS[name]
    torch.manual_seed(0)
    write(folder)
    settings = ScoreSettings.parse({"rewards": [{"type": name, "weights": str(folder)}]})
    with Progress().task(f"build the engines of {name}") as task:
        for backend in BACKENDS.split(","):
            if get_backend(backend).unavailable() is None:
                load_rewards(settings, backend, arguments.engines_dir, torch.device("cpu"), _BATCH, task.describe)
    (engines,) = load_rewards(settings, "auto", arguments.engines_dir, torch.device("cpu"), _BATCH)
    (plain,) = load_rewards(settings, "torch", arguments.engines_dir, torch.device("cpu"), _BATCH)
    script = make_script(folder)
    runs = {
        _ONE_BY_ONE: lambda: run_script(script, video, 1),
        _BATCHED: lambda: run_script(script, video, _BATCH),
        _TORCH: lambda: run_ours(plain, settings, video),
        _ENGINES: lambda: run_ours(engines, settings, video),
    }
    scores = {contender: run() for contender, run in runs.items()}
    largest = max(abs(score) for score in scores.values())
    assert max(scores.values()) - min(scores.values()) <= 1e-3 * max(1.0, largest), scores
    samples = take_turns(runs, arguments.rounds, name)
    return {
        "scores": scores,
        "frames_per_second": {
            contender: arguments.frames / statistics.median(times) for contender, times in samples.items()
        },
        "ratios": [ratio_over(samples, against, asked) for against, asked in _GOALS.items()],
        "backends": dict(engines.backends()),
        "samples_seconds": samples,
    }


def ratio_over(samples: Mapping[str, list[float]], against: str, asked: float) -> dict[str, Any]:
    """Return the speedup of the engines over a contender: the median over the rounds, with the target."""
    ratio = statistics.median(theirs / own for theirs, own in zip(samples[against], samples[_ENGINES], strict=True))
    return {"against": against, "ratio": ratio, "asked": asked, "met": ratio >= asked}


def print_result(result: Mapping[str, Any]) -> None:
    """Print the frames per second and the ratios of each reward."""
    console = Console()
    console.print(result["what"])
    for name, measured in result["rewards"].items():
        table = Table(name, "frames/s")
        for contender, fps in measured["frames_per_second"].items():
            table.add_row(contender, f"{fps:.1f}")
        console.print(table)
        for goal in measured["ratios"]:
            colour = "green" if goal["met"] else "red"
            console.print(
                f"engines over {goal['against']}: [{colour}]{goal['ratio']:.2f}[/] (target {goal['asked']:g})"
            )
        console.print(measured["backends"])


def _write_preparation(folder: Path, processor: str, mean: Any, std: Any, shortest: int) -> None:
    values = {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": mean,
        "image_processor_type": processor,
        "image_std": std,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": shortest},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def _features(output: Any) -> Tensor:
    """Return the features of an output: transformers 4 returns a tensor, transformers 5 an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


if __name__ == "__main__":
    main()
