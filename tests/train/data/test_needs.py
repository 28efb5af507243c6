"""When a sample needs no video, depending on the inputs of the model and the references of the rewards."""

from typing import Any, ClassVar

import pytest

from frostline.rewards.config import RewardConfig, RewardEntry
from frostline.train.data.needs import DEFAULT_NEEDS, SampleNeeds


class Alone(RewardConfig):
    """A reward that uses only the generated frames."""

    needs: ClassVar[frozenset[Any]] = frozenset()


ALONE = Alone.parse({"type": "alone"})
FACES, UNKNOWN = (RewardEntry.parse({"type": name}) for name in ("face_identity", "own:Reward"))
SHARPNESS, MOTION = (RewardEntry.parse({"type": name}) for name in ("sharpness", "motion"))


@pytest.mark.parametrize(
    ("needs_image", "rewards", "without", "with_reference", "references"),
    [
        (True, [ALONE], "the model m needs a first frame", "the model m needs a first frame", False),
        (False, [ALONE], "", "", False),
        (False, [FACES, ALONE], "the reward face_identity needs a reference", "", True),
        (False, [UNKNOWN], "", "", True),
        (False, [MOTION], "the reward motion needs the clip itself", "the reward motion needs the clip itself", False),
        (
            False,
            [FACES, MOTION],
            "the reward motion needs the clip itself, and the reward face_identity needs a reference",
            "the reward motion needs the clip itself",
            True,
        ),
        (
            True,
            [FACES, SHARPNESS],
            "the model m needs a first frame, and the reward face_identity and the reward sharpness need a reference",
            "the model m needs a first frame",
            True,
        ),
    ],
)
def test_what_is_needed(
    needs_image: bool, rewards: list[RewardEntry], without: str, with_reference: str, references: bool
) -> None:
    needs = SampleNeeds.of("m", needs_image, rewards)
    assert needs.refuses_without_video(has_reference=False) == without
    assert needs.refuses_without_video(has_reference=True) == with_reference
    assert needs.references == references


def test_by_default_a_video_is_needed() -> None:
    assert DEFAULT_NEEDS.refuses_without_video(has_reference=True) == "the model needs a first frame"
    assert DEFAULT_NEEDS.references
