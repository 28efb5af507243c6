"""References from a sample's own pictures: the mean over all pictures with a face, whatever the clip shows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from frostline.models.faces import load_detector, load_embedder
from frostline.models.faces.identity import FaceIdentity
from frostline.models.tiny.clips import render_clips
from frostline.rewards.inputs import RewardInputs
from frostline.train import WanTrainingModule

MakeModule = Callable[..., WanTrainingModule]


@pytest.fixture(scope="module")
def module(make_module: MakeModule) -> WanTrainingModule:
    return make_module(rewards=[{"type": "face_identity"}])


@pytest.fixture(scope="module")
def people() -> Tensor:
    """Return five frames of each of two people, (2, 5, 3, 96, 96)."""
    return render_clips(2, torch.Generator().manual_seed(0), num_frames=5, person=torch.tensor([0, 1])).video


def by_hand(pictures: list[Tensor]) -> Tensor:
    """Return the mean embedding (D,) of the faces in (3, h, w) pictures, one at a time."""
    identity = FaceIdentity(load_detector("mtcnn").in_torch(), load_embedder("sface"))
    embeddings = []
    for picture in pictures:
        faces = identity.detect(picture[None, None])
        assert faces.found.all()
        embeddings.append(identity.embed(picture[None, None], faces)[0, 0].detach())
    return torch.stack(embeddings).mean(dim=0)


def data(clips: Tensor, references: list[Tensor | None]) -> dict[str, Any]:
    return {"prompt": ["a person nods"] * len(clips), "video": clips, "reference": references}


def test_the_mean_of_all_pictures_with_a_face(module: WanTrainingModule, people: Tensor) -> None:
    """Compare with the mean over single pictures: the first one counts, too, and one without a face does not."""
    her, him = people
    nobody = torch.full((3, 96, 96), 0.5)
    several = torch.stack([her[0], nobody, her[3], her[4]])
    (faces,) = module.forward_preprocess(data(people, [several, him[:1]])).references
    assert faces["found"].tolist() == [True, True]
    expected = torch.stack([by_hand([her[0], her[3], her[4]]), by_hand([him[0]])])
    torch.testing.assert_close(faces["mean"], expected, atol=1e-5, rtol=0)


def test_the_clip_is_not_looked_at(module: WanTrainingModule, people: Tensor) -> None:
    her, him = people
    of_hers, of_nobody = torch.stack([her[0], her[4]]), torch.full((1, 3, 64, 64), 0.5)
    (faces,) = module.forward_preprocess(data(people[1:], [of_hers])).references
    (mixed,) = module.forward_preprocess(data(people[[1, 1]], [None, of_hers])).references
    torch.testing.assert_close(faces["mean"][0], by_hand([*of_hers]), atol=1e-5, rtol=0)
    assert torch.equal(mixed["mean"][1], faces["mean"][0])
    torch.testing.assert_close(mixed["mean"][0], by_hand([*him[1:]]), atol=1e-5, rtol=0)
    (none,) = module.forward_preprocess(data(people[:1], [of_nobody])).references
    assert not none["found"].any(), "only the pictures count, although the clip has a face"


def test_a_first_frame_without_anybody_can_be_rewarded(module: WanTrainingModule, people: Tensor) -> None:
    """Score against the pictures; without them, there would be no reference."""
    her, him = people
    empty = torch.full((1, 5, 3, 96, 96), 0.5)
    generated = torch.stack([her, him])
    conditioning = module.forward_preprocess(data(empty.repeat(2, 1, 1, 1, 1), [her[:1], her[:1]]))
    ((_, score),) = module.score(generated, conditioning)
    mean = by_hand([her[0]])
    for index, frames in enumerate(generated):
        expected = torch.stack([by_hand([frame]) @ mean for frame in frames]).mean()
        torch.testing.assert_close(score.score[index], expected, atol=1e-4, rtol=0)
    assert score.valid.all()
    assert score.score[0] > 0.5 > 0.3 > score.score[1]
    ((_, unscored),) = module.score(generated[:1], module.forward_preprocess(data(empty, [None])))
    assert not unscored.valid.any()


def test_without_a_video_as_with_one(module: WanTrainingModule, people: Tensor) -> None:
    """Test only the reward, because the built-in model needs a first frame."""
    (active,) = module.rewards
    pictures = people[0, :2]
    with_clip = RewardInputs(("p",), people[1:], (5,), (pictures,))
    without = RewardInputs(("p",), torch.zeros(1, 0, 3, 96, 96), (0,), (pictures,))
    one, other = (active.references(sample, module.runtime) for sample in (with_clip, without))
    assert torch.equal(one["mean"], other["mean"]) and other["found"].all()
