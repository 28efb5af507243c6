"""The face score: the formula compared with plain loops, and the whole path from pixels to the score."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from frostline.models.faces import BatchedMTCNN, FaceIdentity, MissingFace, SFaceEmbedder, identity_score


def plain_score(
    e: Tensor, found: Tensor, g: Tensor, g_found: Tensor, missing_face: MissingFace
) -> tuple[float, list[float], bool]:
    """Return score, frame scores and validity of one sample, computed with plain loops."""
    G = [g[j] for j in range(len(g)) if g_found[j]]
    frames = [0.0] * len(e)
    if not G or not (found.any() or missing_face == "zero"):
        return 0.0, frames, False
    for i in range(len(e)):
        if found[i]:
            frames[i] = sum(float(F.cosine_similarity(e[i], gj, dim=0)) for gj in G) / len(G)
    count = int(found.sum()) if missing_face == "exclude" else len(e)
    return sum(frames) / count, frames, True


@st.composite
def samples(draw: Any) -> dict[str, Tensor]:
    B, T, R, D = (draw(st.integers(low, high)) for low, high in ((1, 3), (1, 5), (0, 4), (2, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)

    def mask(count: int) -> Tensor:
        rows = draw(st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=B, max_size=B))
        return torch.tensor(rows, dtype=torch.bool).reshape(B, count)

    return {
        "embeddings": unit(B, T, D),
        "found": mask(T),
        "reference": unit(B, R, D),
        "reference_found": mask(R),
    }


@given(sample=samples(), missing_face=st.sampled_from(["exclude", "zero"]))
@settings(max_examples=100, deadline=None)
def test_equals_plain_loops(sample: dict[str, Tensor], missing_face: MissingFace) -> None:
    sample["embeddings"].requires_grad_()
    score = identity_score(**sample, missing_face=missing_face)
    for b in range(len(score.valid)):
        e, found = sample["embeddings"][b].detach(), sample["found"][b]
        g, g_found = sample["reference"][b], sample["reference_found"][b]
        expected, frames, valid = plain_score(e, found, g, g_found, missing_face)
        as_zero, _, _ = plain_score(e, found, g, g_found, "zero")
        assert score.face_score[b].item() == pytest.approx(expected, abs=1e-9)
        assert score.frame_scores[b].tolist() == pytest.approx(frames, abs=1e-9)
        assert score.face_score_missing_zero[b].item() == pytest.approx(as_zero, abs=1e-9)
        assert score.valid[b].item() == valid
        assert score.detection_rate[b].item() == pytest.approx(found.double().mean().item())
    score.face_score.sum().backward()
    gradient = sample["embeddings"].grad
    assert gradient is not None and gradient.isfinite().all()
    assert gradient[~score.valid].eq(0).all()
    assert gradient[~sample["found"]].eq(0).all()


def test_garbage_at_missing_faces_does_not_leak() -> None:
    embeddings = torch.full((2, 3, 4), torch.nan)
    embeddings[0, 0] = torch.tensor([1.0, 0, 0, 0])
    reference = torch.full((2, 2, 4), torch.nan)
    reference[:, 1] = torch.tensor([0.6, 0.8, 0, 0])
    found = torch.tensor([[True, False, False], [False, False, False]])
    score = identity_score(embeddings, found, reference, torch.tensor([[False, True]] * 2))
    torch.testing.assert_close(score.face_score, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(score.face_score_missing_zero, torch.tensor([0.2, 0.0]))
    torch.testing.assert_close(score.detection_rate, torch.tensor([1 / 3, 0.0]))
    assert score.valid.tolist() == [True, False]


@pytest.fixture(scope="module")
def identity(sface: SFaceEmbedder) -> FaceIdentity:
    return FaceIdentity(BatchedMTCNN(), sface, upscale=2)


@pytest.fixture(scope="module")
def videos(clip: Callable[..., Tensor]) -> Tensor:
    """Return (3, 4, 3, 96, 96) videos in [0, 1]: the astronaut, the admiral, nobody."""
    people = [clip(96), clip(96, person="hopper"), torch.full((4, 3, 96, 96), 90, dtype=torch.uint8)]
    return torch.stack(people) / 255


def test_scores_videos_from_pixels(identity: FaceIdentity, videos: Tensor) -> None:
    references = identity.references(videos)
    assert references.embeddings.shape == (3, 3, 128)
    assert references.found.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    assert not references.embeddings.requires_grad

    generated = videos.clone()
    generated[0, 2:] = 0.5  # the astronaut is missing in the second half
    generated[1] = videos[0]  # the wrong person
    generated.requires_grad_()
    score = identity.score(generated, references)
    assert score.valid.tolist() == [True, True, False]
    assert score.detection_rate.tolist() == [0.5, 1.0, 0.0]
    assert score.face_score[0] > 0.8 and score.face_score[1] < 0.4
    torch.testing.assert_close(score.face_score_missing_zero[0], score.face_score[0] / 2)

    score.face_score.sum().backward()
    gradient = generated.grad
    assert gradient is not None and gradient.isfinite().all()
    assert gradient[2].eq(0).all() and gradient[0, 2:].eq(0).all()
    assert gradient[0, :2].abs().amax(dim=(1, 2, 3)).gt(0).all()


def test_a_sample_alone_scores_as_in_a_batch(identity: FaceIdentity, videos: Tensor) -> None:
    together = identity.score(videos, identity.references(videos))
    for b in range(3):
        alone = identity.score(videos[b : b + 1], identity.references(videos[b : b + 1]))
        torch.testing.assert_close(alone.face_score, together.face_score[b : b + 1], atol=1e-5, rtol=0)


def test_missing_face_setting(identity: FaceIdentity, sface: SFaceEmbedder, videos: Tensor) -> None:
    strict = FaceIdentity(identity.detector, sface, upscale=2, missing_face="zero")
    generated = videos[:1].clone()
    generated[0, 1:] = 0
    references = identity.references(videos[:1])
    strictly = strict.score(generated, references)
    torch.testing.assert_close(strictly.face_score, identity.score(generated, references).face_score / 4)


def test_autocast_does_not_change_the_reward(identity: FaceIdentity, videos: Tensor) -> None:
    references = identity.references(videos[:1])
    expected = identity.score(videos[:1], references)
    with torch.autocast("cpu", torch.bfloat16):
        score = identity.score(videos[:1], references)
    assert torch.equal(score.face_score, expected.face_score)


def test_videos_of_one_frame_have_no_reference(identity: FaceIdentity, videos: Tensor) -> None:
    references = identity.references(videos[:, :1])
    assert references.embeddings.shape == (3, 0, 128)
    assert not identity.score(videos[:, :1], references).valid.any()
