"""Scores: equal to training's own reward, different for different people, and independent of the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from score_videos import moving, portrait
from torch import Tensor
from video_files import damage_packet, encode

from frostline.models.faces import BatchedMTCNN, FaceIdentity, load_detector, load_embedder
from frostline.models.tiny.clips import held_out_clips
from frostline.rewards.active import RewardStages
from frostline.rewards.face_identity.reward import FaceIdentityReward
from frostline.rewards.inputs import RewardInputs
from frostline.score.result import VideoScore
from frostline.train import WanTrainingModule
from frostline.video import read_video, write_video

ScoreFiles = Callable[..., tuple[VideoScore, ...]]
MakeModule = Callable[..., WanTrainingModule]


@pytest.mark.parametrize("detector", ["mtcnn", "yunet"])
@pytest.mark.parametrize(
    "options",
    [
        {"upscale": 2},
        {"upscale": 2, "missing_face": "zero"},
        {"detection_size": 384, "face": "best"},
    ],
    ids=str,
)
def test_agrees_with_the_reward_of_training(
    detector: str, options: dict[str, Any], make_module: MakeModule, score_files: ScoreFiles, tmp_path: Path
) -> None:
    """Compare with training's own objects on the same frames, with a graph."""
    settings = {"detector": detector, **options}
    module = make_module(rewards=[{"type": "face_identity", **settings}])
    video = held_out_clips(2, seed=3).video
    # Each frame of the second video has two faces, one of them smaller; some frames of the first have none.
    smaller = torch.nn.functional.avg_pool2d(video[0], 2)
    video = torch.cat([video, torch.full_like(video, 0.4)], dim=-1)
    video[1, :, :, 24:72, 120:168] = smaller
    video[0, 5:] = 0.4
    paths = [write_video(tmp_path / f"{i}.mp4", clip, lossless=True) for i, clip in enumerate(video)]
    frames = torch.stack([read_video(path) for path in paths]) / 255
    reward = module.rewards[0].reward
    assert isinstance(reward, FaceIdentityReward)
    run = RewardStages(module.runtime, module.rewards[0].stage_names)
    references = reward.references(RewardInputs(("", ""), frames[[1, 1]], (len(frames[0]),) * 2), run)
    expected = reward.identity_score(frames.requires_grad_(), references, run)
    rows = score_files(paths, paths[1], **settings)
    assert 0 < expected.detection_rate[0] < 1
    for b, row in enumerate(rows):
        assert row.face_score == pytest.approx(expected.face_score[b].item(), abs=1e-6)
        assert row.face_score_missing_zero == pytest.approx(expected.face_score_missing_zero[b].item(), abs=1e-6)
        assert row.detection_rate == pytest.approx(expected.detection_rate[b].item(), abs=1e-6)
        scores = [score or 0.0 for score in row.frame_scores or ()]
        assert scores == pytest.approx(expected.frame_scores[b].tolist(), abs=1e-6)


def test_tells_what_is_in_a_video(people: Path, score_files: ScoreFiles) -> None:
    same, other, nobody, half = score_files(
        [people / f"{name}.mp4" for name in ("astronaut", "hopper", "nobody", "half")], people / "face.png"
    )
    assert same.face_score is not None and other.face_score is not None
    assert same.face_score > 0.8 > 0.4 > other.face_score
    assert (nobody.status, nobody.face_score, nobody.face_score_missing_zero, nobody.detection_rate) == (
        "ok",
        None,
        0,
        0,
    )
    assert half.detection_rate == pytest.approx(0.5)
    assert half.face_score == pytest.approx(2 * (half.face_score_missing_zero or 0), abs=1e-6)
    assert [score is None for score in half.frame_scores or ()] == [False] * 3 + [True] * 3
    found = [score for score in half.frame_scores or () if score is not None]
    assert (half.worst_frame_score, half.best_frame_score) == (min(found), max(found))
    assert found[half.best_frame or 0] == max(found)
    assert (half.frames, half.frames_with_face, half.max_faces, half.width, half.height) == (6, 3, 1, 160, 160)
    assert half.best_frame_box is not None and len(half.best_frame_landmarks or ()) == 5
    assert (half.face_detector, half.face_embedder, half.face_detector_backend) == ("yunet", "sface", "torch")


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a picture and a video of the admiral, large, and the astronaut, small; she is alone in one frame."""
    folder = tmp_path_factory.mktemp("crowd")
    picture = np.full((240, 480, 3), 100, np.uint8)
    picture[:, :240] = portrait("hopper", 240)
    picture[50:190, 290:430] = portrait("astronaut", 140)
    Image.fromarray(picture).save(folder / "both.png")
    frames = np.stack([picture, np.roll(picture, 4, axis=1), picture])
    frames[2, :, :240] = 100
    write_video(folder / "both.mp4", torch.from_numpy(frames).permute(0, 3, 1, 2), lossless=True)
    return folder


@pytest.mark.parametrize("detector", ["mtcnn", "yunet"])
def test_which_of_several_faces_counts(detector: str, crowd: Path, people: Path, score_files: ScoreFiles) -> None:
    (largest,) = score_files([crowd / "both.mp4"], people / "face.png", detector=detector)
    (best,) = score_files([crowd / "both.mp4"], people / "face.png", detector=detector, face="best")
    assert largest.max_faces == best.max_faces == 2
    scores = largest.frame_scores or ()
    assert max(score or 0 for score in scores[:2]) < 0.4 < 0.8 < (scores[2] or 0)
    assert all((score or 0) > 0.8 for score in best.frame_scores or ())
    # The box of best and worst frame must be hers, not the admiral's.
    for box in (best.best_frame_box, best.worst_frame_box):
        assert box is not None and box[0] > 240
    assert largest.worst_frame_box is not None and largest.worst_frame_box[0] < 240
    (admiral,) = score_files([crowd / "both.mp4"], people / "hopper.mp4", detector=detector, face="best", max_frames=2)
    assert admiral.face_score is not None and admiral.face_score > 0.8


def test_several_faces_in_a_reference_are_told(crowd: Path, people: Path, score_files: ScoreFiles) -> None:
    for reference, said in (
        ("both.png", "reference: 2 faces were found; the largest is used"),
        ("both.mp4", "reference: in 2 of its 3 frames, up to 2 faces were found; the largest is used"),
    ):
        for face in ("largest", "best"):
            (row,) = score_files([people / "hopper.mp4"], crowd / reference, face=face)
            assert row.note == said
    (row,) = score_files([people / "hopper.mp4"], people / "face.png")
    assert row.note == ""


@pytest.mark.parametrize("missing_face", ["exclude", "zero"])
def test_a_video_without_a_face_is_told(missing_face: str, people: Path, score_files: ScoreFiles) -> None:
    (row,) = score_files([people / "nobody.mp4"], people / "face.png", missing_face=missing_face)
    assert (row.status, row.detection_rate) == ("ok", 0)
    assert row.face_score == (0 if missing_face == "zero" else None)
    assert row.note == "face_score: no face was found in any frame"


def test_what_is_wrong_with_a_reference_is_told(people: Path, score_files: ScoreFiles, tmp_path: Path) -> None:
    reference = encode(tmp_path / "a.mkv", list(moving("astronaut", 8).permute(0, 2, 3, 1).numpy()), gop=4, b_frames=0)
    damage_packet(reference, 6)
    (row,) = score_files([people / "astronaut.mp4"], reference)
    assert row.status == "ok" and row.note.startswith("reference: 1 of its 8 frames cannot be decoded")


def test_frames_are_chosen(people: Path, score_files: ScoreFiles) -> None:
    (row,) = score_files([people / "half.mp4"], people / "face.png", every=2, max_frames=2)
    (full,) = score_files([people / "half.mp4"], people / "face.png")
    assert row.frame_numbers == (0, 2)
    assert row.frame_scores == pytest.approx([(full.frame_scores or ())[t] for t in (0, 2)], abs=1e-6)


def test_a_reference_video_leaves_out_its_first_frame(people: Path, score_files: ScoreFiles, tmp_path: Path) -> None:
    """Leave it out like in training, where the first frame is given."""
    video = read_video(people / "astronaut.mp4")
    start = read_video(people / "hopper.mp4")[:1]
    reference = write_video(tmp_path / "reference.mp4", torch.cat([start, video]), lossless=True)
    (row,) = score_files([people / "hopper.mp4"], reference)
    assert row.face_score is not None and row.face_score < 0.4


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("detector", ["mtcnn", "yunet"])
def test_a_video_alone_scores_as_in_any_batch(batch: int, detector: str, people: Path, score_files: ScoreFiles) -> None:
    videos = [people / f"{name}.mp4" for name in ("half", "astronaut", "hopper", "nobody", "half")]
    together = score_files(videos, people / "face.png", batch=batch, detector=detector)
    assert [row.index for row in together] == list(range(5))
    for video, row in zip(videos, together, strict=True):
        (alone,) = score_files([video], people / "face.png", detector=detector, batch=7)
        assert row.frame_scores == pytest.approx(alone.frame_scores, abs=1e-5)
        assert row.worst_frame_box == pytest.approx(alone.worst_frame_box, abs=0.02)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda frames: frames,
    "mirrored": lambda frames: frames.flip(-1),
    "dark": lambda frames: (frames * 0.6).byte(),
    "bright": lambda frames: (frames * 1.3).clamp(0, 255).byte(),
    "low contrast": lambda frames: (frames * 0.5 + 64).byte(),
    "grey": lambda frames: frames.float().mean(dim=1, keepdim=True).expand(-1, 3, -1, -1).byte(),
    "noisy": lambda frames: (frames + 12 * torch.randn(frames.shape)).clamp(0, 255).byte(),
    "blurred": lambda frames: torch.nn.functional.avg_pool2d(frames.float(), 3, 1, 1).byte(),
    "small": lambda frames: torch.nn.functional.interpolate(frames.float(), scale_factor=0.6, mode="area").byte(),
    "turned": lambda frames: _turned(frames, 12),
}


def _turned(frames: Tensor, degrees: float) -> Tensor:
    angle = np.deg2rad(degrees)
    matrix = torch.tensor(
        [[[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]]], dtype=torch.float32
    )
    grid = torch.nn.functional.affine_grid(matrix.expand(len(frames), -1, -1), list(frames.shape), align_corners=False)
    return torch.nn.functional.grid_sample(frames.float(), grid, align_corners=False, padding_mode="border").byte()


@pytest.mark.parametrize("detector", ["mtcnn", "yunet"])
def test_the_same_person_scores_above_any_other(
    detector: str, people: Path, score_files: ScoreFiles, tmp_path: Path
) -> None:
    """Compare ten altered videos of each of two people with a plain video of both: the scores do not overlap."""
    videos, same = [], []
    for person in ("astronaut", "hopper"):
        frames = read_video(people / f"{person}.mp4")[:2]
        for name, change in AUGMENTATIONS.items():
            videos.append(write_video(tmp_path / f"{person} {name}.mp4", change(frames), lossless=True))
            same.append(person)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for person in ("astronaut", "hopper"):
        rows = score_files(videos, people / f"{person}.mp4", detector=detector)
        for row, who in zip(rows, same, strict=True):
            assert row.face_score is not None, row.video
            scores[who == person].append(row.face_score)
    assert len(scores[True]) == len(scores[False]) == 20
    assert min(scores[True]) > 0.55 > 0.4 > max(scores[False])


def test_observe_sees_what_detect_and_embed_see(people: Path) -> None:
    identity = FaceIdentity(BatchedMTCNN(), load_embedder("sface"), upscale=1)
    pixels = read_video(people / "half.mp4")
    seen = identity.observe(pixels)
    faces = identity.detect(pixels[None] / 255)
    assert torch.equal(seen.numbers > 0, faces.found[0])
    expected = identity.embed(pixels[None] / 255, faces)[0][faces.found[0]]
    torch.testing.assert_close(seen.embeddings, expected, atol=1e-6, rtol=0)
    parts = seen.split([2, 4])
    assert [len(part.embeddings) for part in parts] == [2, 1]
    for whole, joined in zip(seen, type(seen).join(parts), strict=True):
        assert torch.equal(whole, joined)
    assert load_detector("mtcnn").name == "mtcnn"
