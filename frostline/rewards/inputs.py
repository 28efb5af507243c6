"""What a reward is told of samples beside the generated frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

# Cached conditions depend on what this file imports.
if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["prompt", "reference", "clip", "latents"]
"""What a reward may need of a sample: its prompt, what shows how it should look (pictures, or else its clip), its clip
whatever pictures there are, the generated latents."""
COMPARES: frozenset[Need] = frozenset({"reference", "clip"})
"""The needs of rewards that compare: in scoring, with the reference video or picture."""
KEEPS: frozenset[Need] = frozenset({*COMPARES, "prompt"})
"""The needs of rewards that keep something of each sample: their `references` are called."""


@dataclass(frozen=True, eq=False)
class RewardInputs:
    """B samples.

    prompts: one each.
    video: the clip of the sample, (B, T, 3, H, W) in [0, 1]; frame 0 is the start frame that the generated video is
        given.
    valid_frames: number of frames of each clip that count; the frames after them are copies of the last one. For a
        picture it is 2: rewards leave out frame 0. For a sample without a video it is 0: no frame means anything.
    reference: of each sample, pictures (R, 3, h, w) in [0, 1] that show the subject, where the data names them apart
        from the clip; None where the clip is its own reference. Every picture counts, also the first. Empty: all None.
    fps: frames per second of each clip, None where it is not known. Empty: all None.
    latents: (B, C, F, h, w), the generated latents; only of samples whose generated frames are scored.
    """

    prompts: tuple[str, ...]
    video: Tensor
    valid_frames: tuple[int, ...]
    reference: tuple[Tensor | None, ...] = ()
    fps: tuple[float | None, ...] = ()
    latents: Tensor | None = None

    def rows(self, indices: list[int]) -> RewardInputs:
        """Some of the samples."""
        return replace(
            self,
            prompts=tuple(self.prompts[index] for index in indices),
            video=self.video[indices],
            valid_frames=tuple(self.valid_frames[index] for index in indices),
            reference=tuple(self.reference[index] for index in indices) if self.reference else (),
            fps=tuple(self.fps[index] for index in indices) if self.fps else (),
            latents=None if self.latents is None else self.latents[indices],
        )

    def row(self, index: int) -> RewardInputs:
        """One sample, its clip without padding."""
        one = self.rows([index])
        return replace(one, video=one.video[:, : one.valid_frames[0]])
