"""Frames that pad a clip repeat its last frame: they are not part of references and of ground truth."""

import csv
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import QUICK, clips
from torch import Tensor

from frostline.errors import ConfigError
from frostline.rewards.active import RewardStages
from frostline.rewards.config import RewardConfig
from frostline.rewards.inputs import RewardInputs
from frostline.rewards.reward import Reward, RewardScore
from frostline.train import WanTrainingModule
from frostline.train.data.batch import pad_frames
from frostline.train.loop.evaluation import Evaluation, _psnr
from frostline.train.loop.validation import Validation, _write
from frostline.video import read_video

MakeModule = Callable[..., WanTrainingModule]
SHARPNESS = {"type": "sharpness", "baseline": 0.0, "scale": 1.0, "weight": 0.5}


class EveryFrame(Reward):
    """A reward that stores a number for each frame."""

    Config = RewardConfig
    name = "every_frame"

    def __init__(self, config: RewardConfig) -> None:
        pass

    def references(self, sample: RewardInputs, run: RewardStages) -> dict[str, Tensor]:
        return {"means": sample.video.mean(dim=(2, 3, 4))}

    def score(
        self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor], run: RewardStages
    ) -> RewardScore:
        mean = frames.mean(dim=(1, 2, 3, 4))
        return RewardScore(mean, torch.ones_like(mean, dtype=torch.bool))


def padded(frames: int, own: int) -> dict[str, Any]:
    """Return one clip that is padded to `frames`; `own` frames are its own, and the last of them shows another face."""
    data = clips(1, num_frames=frames, size=64)
    other = clips(2, seed=5, num_frames=frames, size=64)["video"][1:]
    video = data["video"][:, :own].clone()
    video[:, -1] = other[:, -1]
    return {"prompt": data["prompt"], "video": pad_frames(video, frames, dim=1), "valid_frames": [own]}


def test_references_are_those_of_the_clip_alone(make_module: MakeModule) -> None:
    module = make_module(rewards=[{"type": "face_identity", "upscale": 2}, SHARPNESS], cache_bytes=0, **QUICK)
    data = padded(9, 5)
    face, sharpness = module.forward_preprocess(data).references
    alone_face, alone_sharpness = module.forward_preprocess(
        {**data, "video": data["video"][:, :5], "valid_frames": [5]}
    ).references
    counted_face, counted_sharpness = module.forward_preprocess({**data, "valid_frames": [9]}).references
    assert face["found"].all()
    torch.testing.assert_close(face["mean"], alone_face["mean"], atol=1e-6, rtol=0)
    torch.testing.assert_close(sharpness["sharpness"], alone_sharpness["sharpness"])
    # If padding counted, four copies of the last frame would count like its own frames.
    assert (face["mean"] - counted_face["mean"]).norm() > 0.05
    assert (sharpness["sharpness"] - counted_sharpness["sharpness"]).abs() > 0


def test_every_row_of_a_batch_counts_as_far_as_it_goes(make_module: MakeModule) -> None:
    """Cache each row by its own frames."""
    module = make_module(rewards=[{"type": "face_identity", "upscale": 2}], **QUICK)
    data = padded(9, 5)
    both = {"prompt": data["prompt"] * 2, "video": data["video"].repeat(2, 1, 1, 1, 1), "valid_frames": [5, 9]}
    (faces,) = module.forward_preprocess(both).references
    for row, own in enumerate((5, 9)):
        (alone,) = module.forward_preprocess({**data, "valid_frames": [own]}).references
        assert torch.equal(faces["mean"][row], alone["mean"][0])
    assert not torch.equal(faces["mean"][0], faces["mean"][1])


def test_of_a_picture_its_one_frame_is_the_reference(make_module: MakeModule) -> None:
    """Use the only frame; of a video, the first frame is left out, because it is given."""
    module = make_module(rewards=[{"type": "face_identity", "upscale": 2}], cache_bytes=0, **QUICK)
    picture = clips(1, num_frames=5, size=64)["video"][:, :1]
    data = {"prompt": ["p"], "video": picture.expand(-1, 9, -1, -1, -1), "valid_frames": [1]}
    (faces,) = module.forward_preprocess(data).references
    (whole,) = module.forward_preprocess({**data, "valid_frames": [9]}).references
    assert faces["found"].all()
    torch.testing.assert_close(faces["mean"], whole["mean"], atol=1e-6, rtol=0)


def test_frames_that_make_the_number_4k_plus_1_are_padding_too(make_module: MakeModule) -> None:
    module = make_module(rewards=[{"type": "face_identity", "upscale": 2}], cache_bytes=0, **QUICK)
    video = padded(9, 6)["video"][:, :6]
    (fitted,) = module.forward_preprocess({"prompt": ["p"], "video": video}).references
    longer = {"prompt": ["p"], "video": pad_frames(video, 9, dim=1), "valid_frames": [6]}
    (expected,) = module.forward_preprocess(longer).references
    torch.testing.assert_close(fitted["mean"], expected["mean"], atol=1e-6, rtol=0)


def test_a_reward_that_keeps_every_frame_wants_clips_of_one_length(make_module: MakeModule) -> None:
    own = {"type": "test_padding:EveryFrame"}
    module = make_module(rewards=[own], **QUICK)
    data = padded(9, 5)
    both = {"prompt": data["prompt"] * 2, "video": data["video"].repeat(2, 1, 1, 1, 1), "valid_frames": [5, 9]}
    with pytest.raises(ConfigError, match=r"every_frame stores data of each frame.*\[5, 9\] frames"):
        module(both)


def test_truth_ends_with_the_clip(tmp_path: Path) -> None:
    video, generated = torch.rand(5, 3, 32, 32), torch.rand(1, 5, 3, 32, 32)
    generated[0, :3] = video[:3]
    assert _psnr(generated, video[None], [3]).item() == pytest.approx(100)
    assert _psnr(generated, video[None], [5]).item() < 20
    dataset: Any = [{"sample_id": "a", "prompt": "p", "video": video, "valid_frames": 3}]
    _write(Validation(dataset, [0]), Evaluation({"psnr": torch.ones(1)}, generated), tmp_path, "step-000001")
    with (tmp_path / "step-000001.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (len(read_video(tmp_path / row["reference"])), len(read_video(tmp_path / row["video"]))) == (3, 5)


def test_a_prompt_that_is_cut_is_told_of_once(make_module: MakeModule, caplog: pytest.LogCaptureFixture) -> None:
    module = make_module(rewards=[SHARPNESS], cache_bytes=0, **QUICK)
    data = clips(2, num_frames=5, size=32)
    module.forward_preprocess(data)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    for words in (700, 800):
        module.forward_preprocess({**data, "prompt": ["nod " * words, "nod"], "sample_id": ["long", "short"]})
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    limit = module.components.text_length
    assert f"sample long: its prompt has 701 tokens, the text encoder uses the first {limit}" in record.getMessage()
