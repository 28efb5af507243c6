"""Score rewards that need a whole clip, such as custom classes. The frames are kept in memory, up to a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from frostline.rewards.inputs import RewardInputs
from frostline.score.decoding import Chunk
from frostline.score.request import Pair
from frostline.score.rewards.base import ReferenceTrack, RewardResult, ScoredReward, Track, VideoTrack

CLIP_BYTES = 2 * 2**30
"""The maximum size of the fp32 frames of one clip."""


class ClipReward(ScoredReward):
    """Score rewards that are neither `face_identity` nor a `FrameReward`, with whole clips, as in training.

    The `video` of a sample is the reference, or the scored clip if the reward does not need a reference. A reference
    picture is repeated to two frames, as in training.
    """

    @property
    def references_depend_on_prompts(self) -> bool:
        """Return whether the reward needs references, because their state contains the prompt."""
        return self.needs_reference

    def prompt_of(self, pair: Pair) -> str:
        """Return the prompt, even if the reward does not declare that it needs one."""
        return pair.prompt

    def reference(self, pair: Pair) -> ClipReference:
        """Return the initial state of a reference, which keeps its frames until the end."""
        return ClipReference(self, pair)

    def video(self, pair: Pair, reference: ReferenceTrack | None) -> ClipVideo:
        """Return the initial state of a video, which keeps its frames until the end."""
        assert reference is None or isinstance(reference, ClipReference)
        return ClipVideo(self, pair, reference)

    def observe(self, parts: Sequence[Tensor]) -> list[None]:
        """Return None for each part: whole clips are scored at the end."""
        return [None] * len(parts)

    @torch.no_grad()
    def keep(self, sample: RewardInputs) -> Mapping[str, Tensor]:
        """Compute the reward's tensors of a reference."""
        return self.active.references(sample, self.runtime)

    @torch.no_grad()
    def judge(self, frames: Tensor, sample: RewardInputs, references: Mapping[str, Tensor]) -> RewardResult:
        """Score a clip (1, T, 3, H, W) in [0, 1]."""
        return self.result_of(self.active.score(frames, sample, references, self.runtime))


class _Frames(Track):
    """Keep all frames of a video or reference in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._chunks: list[Tensor] = []
        self._bytes = 0

    def take(self, chunk: Chunk) -> Tensor:
        """Return no frames, because they are only used at the end."""
        return chunk.frames[:0]

    def add(self, chunk: Chunk, seen: None) -> None:
        """Add the frames of a chunk.

        If the frames differ in size or exceed `CLIP_BYTES`, all frames are dropped and `fault` is set.
        """
        self._bytes += chunk.frames.numel() * 4
        if self._chunks and self._chunks[0].shape[1:] != chunk.frames.shape[1:]:
            self.fault = "the reward needs a whole clip, but the frames differ in size"
        elif self._bytes > CLIP_BYTES:
            self.fault = (
                f"the reward needs a whole clip, but its frames exceed {CLIP_BYTES // 2**30} GiB: set --max-frames"
            )
        self._chunks = [] if self.fault else [*self._chunks, chunk.frames]

    def clip(self, device: torch.device) -> Tensor:
        """Return all frames, (1, T, 3, H, W) in [0, 1], and release them."""
        frames, self._chunks = torch.cat(self._chunks), []
        return frames[None].to(device).float() / 255


class ClipReference(_Frames, ReferenceTrack):
    """The state of a reference.

    Attributes:
        kept: the reward's tensors of the reference, after `finish`.
        sample: the inputs of the reward, after `finish`.
    """

    def __init__(self, reward: ClipReward, pair: Pair) -> None:
        super().__init__()
        self.reward = reward
        self.prompt = reward.prompt_of(pair)
        self.kept: Mapping[str, Tensor] = {}
        self.sample: RewardInputs | None = None

    def finish(self) -> None:
        """Compute the reward's tensors of the reference."""
        clip = self.clip(self.reward.device)
        picture = clip[0] if clip.shape[1] == 1 else None
        clip = clip if picture is None else clip.expand(-1, 2, -1, -1, -1)
        self.sample = RewardInputs((self.prompt,), clip, (clip.shape[1],), (picture,))
        self.kept = self.reward.keep(self.sample)


class ClipVideo(_Frames, VideoTrack):
    """The state of a video; keeps its frames until it is scored."""

    def __init__(self, reward: ClipReward, pair: Pair, reference: ClipReference | None) -> None:
        super().__init__()
        self.reward = reward
        self.prompt = reward.prompt_of(pair)
        self.reference = reference

    def result(self) -> RewardResult:
        """Score the whole clip."""
        frames = self.clip(self.reward.device)
        if self.reference is not None:
            assert self.reference.sample is not None
            return self.reward.judge(frames, self.reference.sample, self.reference.kept)
        sample = RewardInputs((self.prompt,), frames, (frames.shape[1],))
        return self.reward.judge(frames, sample, self.reward.keep(sample))
