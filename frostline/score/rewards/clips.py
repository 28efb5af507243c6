"""Rewards that want a whole clip at once, as a user's class may: its frames are kept until it ends, within a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from frostline.rewards.inputs import RewardInputs
from frostline.score.decoding import Chunk
from frostline.score.request import Pair
from frostline.score.rewards.base import ReferenceTrack, RewardResult, ScoredReward, Track, VideoTrack

CLIP_BYTES = 2 * 2**30
"""Of the frames of one clip in fp32, as a reward takes them."""


class ClipReward(ScoredReward):
    """Any other reward: its `references` and `score` get whole clips, as in training, of up to `CLIP_BYTES`.

    Of a sample, `video` is the reference, a picture twice over as in training, or the scored clip itself where the
    reward needs no reference.
    """

    @property
    def references_depend_on_prompts(self) -> bool:
        """They are computed of prompt and clip together."""
        return self.needs_reference

    def prompt_of(self, pair: Pair) -> str:
        """The prompt, whether the reward declares that it needs it or not."""
        return pair.prompt

    def reference(self, pair: Pair) -> ClipReference:
        """A reference whose frames are kept until it ends."""
        return ClipReference(self, pair)

    def video(self, pair: Pair, reference: ReferenceTrack | None) -> ClipVideo:
        """A video whose frames are kept until it ends."""
        assert reference is None or isinstance(reference, ClipReference)
        return ClipVideo(self, pair, reference)

    def observe(self, parts: Sequence[Tensor]) -> list[None]:
        """See nothing yet."""
        return [None] * len(parts)

    @torch.no_grad()
    def keep(self, sample: RewardInputs) -> Mapping[str, Tensor]:
        """What the reward keeps of a reference."""
        return self.active.references(sample, self.runtime)

    @torch.no_grad()
    def judge(self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor]) -> RewardResult:
        """Score a clip (1, T, 3, H, W) in [0, 1]."""
        return self.result_of(self.active.score(frames, sample, references, self.runtime))


class _Frames(Track):
    """Keeps frames."""

    def __init__(self) -> None:
        super().__init__()
        self._chunks: list[Tensor] = []
        self._bytes = 0

    def take(self, chunk: Chunk) -> Tensor:
        """Nothing to look at yet."""
        return chunk.frames[:0]

    def add(self, chunk: Chunk, seen: None) -> None:
        """Keep the frames of a chunk, or none of any where they become too many."""
        self._bytes += chunk.frames.numel() * 4
        if self._chunks and self._chunks[0].shape[1:] != chunk.frames.shape[1:]:
            self.fault = "wants a whole clip, and the size of its frames changes"
        elif self._bytes > CLIP_BYTES:
            self.fault = (
                f"wants a whole clip, and its frames take more than {CLIP_BYTES // 2**30} GiB (see --max-frames)"
            )
        self._chunks = [] if self.fault else [*self._chunks, chunk.frames]

    def clip(self, device: torch.device) -> Tensor:
        """All frames (1, T, 3, H, W) in [0, 1]; they are not kept any longer."""
        frames, self._chunks = torch.cat(self._chunks), []
        return frames[None].to(device).float() / 255


class ClipReference(_Frames, ReferenceTrack):
    """A reference, and at its end what the reward keeps of it. sample: as the reward is told of it."""

    def __init__(self, reward: ClipReward, pair: Pair) -> None:
        super().__init__()
        self.reward = reward
        self.prompt = reward.prompt_of(pair)
        self.kept: Mapping[str, Tensor] = {}
        self.sample: RewardInputs | None = None

    def finish(self) -> None:
        """Compute what is kept."""
        clip = self.clip(self.reward.device)
        picture = clip[0] if clip.shape[1] == 1 else None
        clip = clip if picture is None else clip.expand(-1, 2, -1, -1, -1)
        self.sample = RewardInputs((self.prompt,), clip, (clip.shape[1],), (picture,))
        self.kept = self.reward.keep(self.sample)


class ClipVideo(_Frames, VideoTrack):
    """A video until it is scored."""

    def __init__(self, reward: ClipReward, pair: Pair, reference: ClipReference | None) -> None:
        super().__init__()
        self.reward = reward
        self.prompt = reward.prompt_of(pair)
        self.reference = reference

    def result(self) -> RewardResult:
        """Score all frames at once."""
        frames = self.clip(self.reward.device)
        if self.reference is not None:
            assert self.reference.sample is not None
            return self.reward.judge(frames, self.reference.sample, self.reference.kept)
        sample = RewardInputs((self.prompt,), frames, (frames.shape[1],))
        return self.reward.judge(frames, sample, self.reward.keep(sample))
