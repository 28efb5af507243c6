"""Compare the frames per second of `frostline score` with facenet-pytorch, and with OpenCV's YuNet and SFace.

    python benchmarks/faces.py --out benchmarks/results/faces.json

All contenders run alternately in one process, on the same video and with the same number of threads. Their results are
compared before their times are measured. Each ratio is the median over the rounds of the ratio of two times of the same
round. facenet-pytorch is used as in its examples: `mtcnn(frame)`, then `resnet(face[None])`, one frame at a time. Its
embedder has random weights, because the trained ones need a download; they do not affect the speed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import skimage.data
import torch
from building import BACKENDS, ENGINES
from facenet_pytorch import MTCNN, InceptionResnetV1
from measuring import RESULTS, machine, write_result
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from frostline.models.faces.networks import bundled_model
from frostline.progress import Progress
from frostline.runtime.backends import get_backend
from frostline.score.request import Pair
from frostline.score.rewards.faces import FaceReward
from frostline.score.rewards.loading import load_rewards
from frostline.score.scorer import Scorer
from frostline.score.settings import ScoreSettings
from frostline.video import read_video, stream_video, write_video

_YUNET = "face_detection_yunet_2023mar_int8bq.onnx"
_SFACE = "face_recognition_sface_2021dec_int8bq.onnx"
_BATCH = 32
# The comparisons: (contender, baseline, section, target: the minimum ratio).
_GOALS = (
    ("frostline yunet + sface", "facenet-pytorch", "whole path", 5.0),
    ("frostline mtcnn + facenet", "facenet-pytorch", "whole path", 2.0),
    ("frostline yunet + sface", "opencv", "whole path", 1.0),
    ("frostline yunet", "opencv yunet", "detect", 1.0),
    ("frostline sface", "opencv sface", "embed", 1.0),
)

Run = Callable[[], object]


class Facenet:
    """facenet-pytorch, used as in its examples."""

    def __init__(self, resnet: torch.nn.Module) -> None:
        self.mtcnn = MTCNN(image_size=160)
        self.resnet = resnet

    @torch.no_grad()
    def score(self, path: Path, reference: Tensor) -> list[float]:
        scores = []
        for frame in opencv_frames(path):
            face = self.mtcnn(Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
            scores.append(float(self.resnet(face[None]) @ reference))
        return scores

    def detect(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        return [self.mtcnn.detect(frame)[0] for frame in frames]

    @torch.no_grad()
    def embed(self, faces: Tensor) -> Tensor:
        return torch.cat([self.resnet(face[None]) for face in faces])


class OpenCV:
    """OpenCV's own FaceDetectorYN and FaceRecognizerSF on the same weights."""

    def __init__(self, size: int, folder: Path) -> None:
        self.detector = cv2.FaceDetectorYN.create(str(bundled_model(_YUNET)), "", (size, size))
        # The graph lists its weights as inputs, which OpenCV 5 would require. Only the real input is kept.
        model = onnx.load(bundled_model(_SFACE))
        inputs = [value for value in model.graph.input if value.name == "data"]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        onnx.save(model, folder / "sface.onnx")
        self.recognizer = cv2.FaceRecognizerSF.create(str(folder / "sface.onnx"), "")

    def score(self, path: Path, reference: np.ndarray) -> list[float]:
        scores = []
        for frame in opencv_frames(path):
            crop = self.recognizer.alignCrop(frame, self.detector.detect(frame)[1][0])
            feature = self.recognizer.feature(crop)[0]
            scores.append(float(feature @ reference / np.linalg.norm(feature)))
        return scores

    def detect(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        return [self.detector.detect(frame)[1].copy() for frame in frames]

    def crops(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        return [self.recognizer.alignCrop(frame, self.detector.detect(frame)[1][0]).copy() for frame in frames]

    def embed(self, crops: list[np.ndarray]) -> np.ndarray:
        features = np.concatenate([self.recognizer.feature(crop).copy() for crop in crops])  # its buffer is reused
        return features / np.linalg.norm(features, axis=1, keepdims=True)


class Frostline:
    """`frostline score` with this detector and embedder, without the command line."""

    def __init__(self, settings: ScoreSettings, reward: FaceReward, reference: Path) -> None:
        self.scorer = Scorer([reward], settings, _BATCH)
        self.reward = reward
        self.reference = reference

    def score(self, path: Path) -> list[float]:
        (row,) = self.scorer.score([Pair(0, str(path), str(self.reference))])
        assert row.status == "ok", row.error
        return [-1.0 if score is None else score for score in row.frame_scores or ()]

    def detect(self, frames: Tensor) -> Any:
        return [self.reward.identity.detector.detect(part) for part in frames.split(_BATCH)]

    def embed(self, faces: Tensor) -> Tensor:
        return torch.cat([self.reward.identity.reference_embedder(part) for part in faces.split(_BATCH)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "faces.json")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines-dir", type=Path, default=ENGINES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_result(arguments.out, result)
    print_result(result)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare the results of all contenders, then measure their times."""
    video = write_video(folder / "video.mp4", clip(arguments.frames, arguments.size), fps=16)
    picture = folder / "face.png"
    Image.fromarray(skimage.data.astronaut()[0:300, 60:360]).save(picture)
    torch.manual_seed(0)
    resnet = InceptionResnetV1(pretrained=None, classify=False).eval()
    torch.save(resnet.state_dict(), folder / "facenet.pt")
    ours = load_ours(arguments.engines_dir, folder / "facenet.pt", picture)
    facenet, opencv = Facenet(resnet), OpenCV(arguments.size, folder)

    frames = read_video(video)
    bgr = [np.ascontiguousarray(frame.permute(1, 2, 0).numpy()[..., ::-1]) for frame in frames]
    rgb = [frame.permute(1, 2, 0).numpy() for frame in frames]
    crops = opencv.crops(bgr)
    crop_tensor = torch.from_numpy(np.stack(crops)[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    faces = torch.nn.functional.interpolate(crop_tensor, (160, 160), mode="bilinear")
    reference = torch.nn.functional.normalize(torch.ones(512), dim=0)
    checks = compare(ours, facenet, opencv, frames, bgr, rgb, crops, crop_tensor, faces, video)

    yunet, exact, mixed = ours["yunet + sface"], ours["mtcnn + facenet"], ours["mtcnn + sface"]
    sections: dict[str, dict[str, Run]] = {
        "whole path": {
            "facenet-pytorch": lambda: facenet.score(video, reference),
            "opencv": lambda: opencv.score(video, np.ones(128, np.float32)),
            **{f"frostline {name}": lambda own=own: own.score(video) for name, own in ours.items()},
        },
        "decode": {
            "opencv": lambda: list(opencv_frames(video)),
            "frostline": lambda: list(stream_video(video)),
        },
        "detect": {
            "facenet-pytorch mtcnn": lambda: facenet.detect(rgb),
            "opencv yunet": lambda: opencv.detect(bgr),
            "frostline mtcnn": lambda: exact.detect(frames),
            "frostline yunet": lambda: yunet.detect(frames),
        },
        "embed": {
            "facenet-pytorch": lambda: facenet.embed(faces),
            "opencv sface": lambda: opencv.embed(crops),
            "frostline facenet": lambda: exact.embed(faces),
            "frostline sface": lambda: mixed.embed(crop_tensor),
        },
    }
    load_before = os.getloadavg()
    samples = {section: take_turns(runs, arguments.rounds, section) for section, runs in sections.items()}
    return {
        "command": " ".join(["python", "benchmarks/faces.py", *sys.argv[1:]]),
        "what": f"{arguments.frames} square frames of {arguments.size} px with one face, {arguments.threads} threads",
        "checks": checks,
        "frames_per_second": {
            section: {name: arguments.frames / statistics.median(times) for name, times in runs.items()}
            for section, runs in samples.items()
        },
        "ratios": [goal_result(samples, *goal) for goal in _GOALS],
        "backends": {name: own.reward.backends() for name, own in ours.items()},
        "plan": {name: str(own.reward.runtime.plan).splitlines() for name, own in ours.items()},
        "samples_seconds": samples,
        "machine": {**machine(torch.device("cpu")), "load_before": load_before, "load_after": os.getloadavg()},
    }


def load_ours(engines: Path, facenet_weights: Path, reference: Path) -> dict[str, Frostline]:
    """Build the engines of each pair of detector and embedder; return each pair with the plan that `auto` selects."""
    choices = {
        "yunet + sface": ("yunet", "sface"),
        "mtcnn + facenet": ("mtcnn", f"facenet:{facenet_weights}"),
        "mtcnn + sface": ("mtcnn", "sface"),
    }
    ours = {}
    with Progress().task("build the engines") as task:
        for name, (detector, embedder) in choices.items():
            settings = ScoreSettings(detector=detector, embedder=embedder)
            for backend in BACKENDS.split(","):
                if get_backend(backend).unavailable() is None:
                    load_rewards(settings, backend, engines, torch.device("cpu"), _BATCH, task.describe)
            (reward,) = load_rewards(settings, "auto", engines, torch.device("cpu"), _BATCH)
            assert isinstance(reward, FaceReward)
            ours[name] = Frostline(settings, reward, reference)
    return ours


def compare(
    ours: Mapping[str, Frostline],
    facenet: Facenet,
    opencv: OpenCV,
    frames: Tensor,
    bgr: list[np.ndarray],
    rgb: list[np.ndarray],
    crops: list[np.ndarray],
    crop_tensor: Tensor,
    faces: Tensor,
    video: Path,
) -> dict[str, float]:
    """Compare the results of the contenders, and return the differences.

    Raises:
        AssertionError: the results differ.
    """
    yunet, exact = ours["yunet + sface"], ours["mtcnn + facenet"]
    boxes = torch.cat([part.largest().boxes for part in yunet.detect(frames)])
    theirs = torch.tensor(np.stack([found[0, :4] for found in opencv.detect(bgr)]))
    theirs[:, 2:] += theirs[:, :2]
    exact_boxes = torch.cat([part.largest().boxes for part in exact.detect(frames)])
    facenet_boxes = torch.tensor(np.stack([found[0] for found in facenet.detect(rgb)]).astype(np.float32))
    sface = torch.nn.functional.cosine_similarity(yunet.embed(crop_tensor), torch.from_numpy(opencv.embed(crops)))
    resnet = torch.nn.functional.cosine_similarity(exact.embed(faces), facenet.embed(faces))
    checks = {
        "yunet_box_error_px": (boxes - theirs).abs().max().item(),
        "mtcnn_box_error_px": (exact_boxes - facenet_boxes).abs().max().item(),
        "sface_cosine": sface.min().item(),
        "facenet_cosine": resnet.min().item(),
        "frames_scored": float(min(len([s for s in own.score(video) if s > -1]) for own in ours.values())),
    }
    assert checks["yunet_box_error_px"] <= 0.01 and checks["mtcnn_box_error_px"] <= 0.01, checks
    assert checks["sface_cosine"] >= 0.9999 and checks["facenet_cosine"] >= 0.9999, checks
    assert checks["frames_scored"] == len(frames), checks
    return checks


def take_turns(runs: Mapping[str, Run], rounds: int, section: str) -> dict[str, list[float]]:
    """Return the seconds of each contender in each round; each round begins with a different contender."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    names = list(runs)
    with Progress().bar(section, rounds) as bar:
        for round_ in range(rounds):
            for name in (*names[round_ % len(names) :], *names[: round_ % len(names)]):
                start = time.perf_counter()
                runs[name]()
                samples[name].append(time.perf_counter() - start)
            bar.advance(1)
    return samples


def goal_result(
    samples: Mapping[str, Mapping[str, list[float]]], who: str, against: str, section: str, least: float
) -> dict[str, Any]:
    """Return the median ratio of the times of `against` and `who`, and whether it reaches the target `least`."""
    pairs = zip(samples[section][against], samples[section][who], strict=True)
    ratio = statistics.median(theirs / own for theirs, own in pairs)
    return {"section": section, "who": who, "against": against, "ratio": ratio, "asked": least, "met": ratio >= least}


def clip(frames: int, size: int) -> Tensor:
    """Return (frames, 3, size, size) uint8: a portrait that moves and flickers (NASA's picture of Eileen Collins)."""
    portrait = np.array(Image.fromarray(skimage.data.astronaut()[0:300, 60:360]).resize((size, size)))
    pictures = [np.roll(portrait, (t % 7, -(t % 11)), axis=(0, 1)) * (0.85 + 0.02 * (t % 8)) for t in range(frames)]
    return torch.from_numpy(np.stack(pictures).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def opencv_frames(path: Path) -> Any:
    """Yield the frames of a video as OpenCV reads them: (H, W, 3) uint8, BGR."""
    capture = cv2.VideoCapture(str(path))
    while (read := capture.read())[0]:
        yield read[1]


def print_result(result: Mapping[str, Any]) -> None:
    """Print the frames per second, the ratios with their targets, and the backends."""
    console = Console()
    console.print(result["what"])
    table = Table("", "", "frames/s")
    for section, figures in result["frames_per_second"].items():
        for name, fps in figures.items():
            table.add_row(section, name, f"{fps:.1f}")
            section = ""
        table.add_section()
    console.print(table)
    table = Table("", "baseline", "section", "ratio", "target")
    for goal in result["ratios"]:
        colour = "green" if goal["met"] else "red"
        ratio = f"[{colour}]{goal['ratio']:.2f}[/]"
        table.add_row(goal["who"], goal["against"], goal["section"], ratio, f"{goal['asked']:g}")
    console.print(table)
    console.print({name: " and ".join(backends.values()) for name, backends in result["backends"].items()})


if __name__ == "__main__":
    main()
