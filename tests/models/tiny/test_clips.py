"""The clips on which the tiny model is trained: reproducible, in range, complete, and with a face in every frame."""

import pytest
import torch

from frostline.models.faces import BatchedMTCNN, FaceIdentity, SFaceEmbedder, quantize_frames
from frostline.models.tiny.clips import (
    NUM_FRAMES,
    PEOPLE,
    PROMPTS,
    SIZE,
    Clips,
    held_out_clips,
    portraits,
    render_clips,
)


@pytest.fixture(scope="module")
def clips() -> Clips:
    """Return a clip of every prompt with every person."""
    return held_out_clips(len(PROMPTS) * len(PEOPLE), seed=0)


def test_shape_and_range(clips: Clips) -> None:
    assert clips.video.shape == (10, NUM_FRAMES, 3, SIZE, SIZE)
    assert clips.video.dtype == torch.float32
    assert clips.video.min() >= 0
    assert clips.video.max() <= 1
    assert clips.video.flatten(1).std(dim=1).min() > 0.05


def test_held_out_clips_cover_all_prompts_and_people_evenly(clips: Clips) -> None:
    shown = set(zip(clips.prompts, clips.person.tolist(), strict=True))
    assert shown == {(prompt, person) for prompt in PROMPTS for person in range(len(PEOPLE))}


def test_a_seed_gives_the_same_clips_and_another_gives_others(clips: Clips) -> None:
    again = held_out_clips(10, seed=0)
    assert torch.equal(again.video, clips.video)
    assert torch.equal(again.prompt, clips.prompt)
    other = held_out_clips(10, seed=1)
    assert (other.video - clips.video).abs().flatten(1).amax(dim=1).min() > 0.05
    state = torch.random.get_rng_state()
    render_clips(1, torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator must not change"


def test_what_is_asked_for_is_rendered() -> None:
    def render(**how: object) -> Clips:
        return render_clips(2, torch.Generator().manual_seed(3), **how)  # type: ignore[arg-type]

    fixed = {"prompt": torch.tensor([4, 1]), "person": torch.tensor([1, 0])}
    whole = render(**fixed)
    assert whole.prompts == [PROMPTS[4], PROMPTS[1]]
    assert whole.person.tolist() == [1, 0]
    alone = render(**fixed, only_frame=5)
    torch.testing.assert_close(alone.video, whole.video[:, 5:6])
    assert render(num_frames=5, size=32).video.shape == (2, 5, 3, 32, 32)


def test_the_first_frame_does_not_tell_the_prompt_but_the_others_do() -> None:
    def render(prompt: int) -> Clips:
        generator = torch.Generator().manual_seed(0)
        return render_clips(1, generator, prompt=torch.tensor([prompt]), person=torch.tensor([0]))

    first = render(0).video
    for prompt in range(1, len(PROMPTS)):
        other = render(prompt).video
        assert (other[:, 0] - first[:, 0]).abs().max() < 0.02
        assert (other[:, -1] - first[:, -1]).abs().mean() > 0.01


def test_faces_are_found_in_every_frame_and_people_are_told_apart(clips: Clips) -> None:
    identity = FaceIdentity(BatchedMTCNN(), SFaceEmbedder())
    faces = BatchedMTCNN().detect(quantize_frames(clips.video.flatten(0, 1))).largest()
    assert faces.found.all()
    references = identity.references(clips.video)
    means = references.embeddings.mean(dim=1)
    cosines = torch.nn.functional.cosine_similarity(means[:, None], means[None], dim=-1)
    same = clips.person[:, None] == clips.person[None]
    assert cosines[same].min() > 0.7
    assert cosines[~same].max() < 0.4


def test_a_drifting_clip_starts_as_the_person_and_ends_as_the_other() -> None:
    def render(drift: torch.Tensor | None) -> Clips:
        person, prompt = torch.tensor([0, 1]), torch.tensor([2, 2])
        return render_clips(2, torch.Generator().manual_seed(5), person=person, prompt=prompt, drift=drift)

    true, still, drifted = render(None), render(torch.zeros(2)), render(torch.ones(2))
    torch.testing.assert_close(still.video, true.video)
    torch.testing.assert_close(drifted.video[:, 0], true.video[:, 0])
    corners = torch.stack([drifted.video, true.video])[..., :8, :8]
    torch.testing.assert_close(corners[0], corners[1], msg="only the face drifts")

    faces = BatchedMTCNN().detect(quantize_frames(drifted.video.flatten(0, 1))).largest()
    assert faces.found.all()
    score = FaceIdentity(BatchedMTCNN(), SFaceEmbedder())
    embeddings = score.references(drifted.video).embeddings
    likeness = (embeddings[:, :1] * embeddings).sum(-1)
    assert likeness[:, 1].min() > 0.7
    assert likeness[:, -1].max() < 0.5
    assert (likeness[:, 3] < likeness[:, 1]).all() and (likeness[:, -1] < likeness[:, 3]).all()


def test_portraits_are_colour_pictures_of_two_people() -> None:
    assert portraits().shape == (2, 3, 256, 256)
    assert portraits().min() >= 0
    assert portraits().max() <= 1
    assert (portraits()[0] - portraits()[1]).abs().mean() > 0.1
