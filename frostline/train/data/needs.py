"""Requirements of a model and of rewards on samples, besides their prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

# The cache key of references depends on the imports of this file, and settings are read without importing torch.
if TYPE_CHECKING:
    from frostline.rewards.config import RewardEntry
    from frostline.rewards.inputs import Need


@dataclass(frozen=True)
class SampleNeeds:
    """What each sample needs besides its prompt.

    Attributes:
        first_frame: name, for errors, of a model that generates from the first frame of the video; otherwise empty.
        compared: names of the rewards that compare with a reference.
        of_clips: names of the rewards that compare with the clip even if the sample has reference pictures.
        references: whether reference pictures are read at all.
        clips: whether a loss is computed on the clips themselves.
    """

    first_frame: str = "the model"
    compared: tuple[str, ...] = ()
    of_clips: tuple[str, ...] = ()
    references: bool = True
    clips: bool = False

    @classmethod
    def of(
        cls, model: str, needs_image: bool, rewards: Iterable[RewardEntry], trains_on_clips: bool = False
    ) -> SampleNeeds:
        """Collect the requirements of a model and of rewards.

        Args:
            model: its name.
            needs_image: whether it generates from a first frame.
            rewards: their settings. The requirements of a class that was not imported are unknown: no sample is
                rejected because of it, and reference pictures are read.
            trains_on_clips: whether a loss is computed on the clips themselves (`sft_weight`).
        """
        stated = [(entry.type, getattr(entry, "needs", None)) for entry in rewards]

        def named(need: Need) -> tuple[str, ...]:
            return tuple(f"the reward {name}" for name, needs in stated if needs is not None and need in needs)

        return cls(
            first_frame=f"the model {model}" if needs_image else "",
            compared=named("reference"),
            of_clips=named("clip"),
            references=any(needs is None or "reference" in needs for _, needs in stated),
            clips=trains_on_clips,
        )

    def refuses_without_video(self, has_reference: bool) -> str:
        """Return why a sample needs a video; empty if it does not.

        Args:
            has_reference: whether it has reference pictures.
        """
        reasons = [f"{self.first_frame} needs a first frame"] if self.first_frame else []
        if self.clips:
            reasons.append("sft_weight trains on the clip itself")
        if self.of_clips:
            reasons.append(f"{_need(self.of_clips)} the clip itself")
        if self.compared and not has_reference:
            reasons.append(f"{_need(self.compared)} a reference")
        return ", and ".join(reasons)


def _need(rewards: tuple[str, ...]) -> str:
    return f"{' and '.join(rewards)} need{'' if rewards[1:] else 's'}"


DEFAULT_NEEDS = SampleNeeds()
"""Requirements if model and rewards are unknown: every sample needs a video, and references are read."""
