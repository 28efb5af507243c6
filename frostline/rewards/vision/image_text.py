"""Compare frames with the prompt: CLIP, PickScore, HPS v2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from frostline.models.precision import parse_precision
from frostline.models.vision.clip import Clip
from frostline.rewards.active import RewardStages
from frostline.rewards.reward import RewardScore
from frostline.rewards.vision.reward import VisionReward
from frostline.rewards.vision.settings import ImageTextConfig
from frostline.rewards.vision.stages import text_stage
from frostline.runtime.stage import Stage
from frostline.stages.shapes import ShapeRange


class ImageTextReward(VisionReward):
    """The cosine similarity of each frame with the prompt, times the model's `scale`, averaged over the frames."""

    Config = ImageTextConfig
    description = (
        "Encode preprocessed images (images, 3, side, side) as unit vectors; the dot product "
        "with a prompt's vector measures how well they match."
    )

    def __init__(self, config: ImageTextConfig, clip: Clip) -> None:
        super().__init__(config, clip.image, clip.prepare, clip.processor_files)
        self.clip = clip
        self.text = clip.text.to(parse_precision(config.precision))
        self.prompts_at_once = ShapeRange().batch[-1]

    @property
    def text_stage_name(self) -> str:
        """Return the name of the text tower's stage."""
        return f"{self.config.type}_text"

    def stages(self, shapes: ShapeRange) -> Sequence[Stage]:
        """Return the stages of both towers."""
        self.prompts_at_once = shapes.batch[-1]
        return (*super().stages(shapes), text_stage(self.text_stage_name, self.clip, self.config.license, shapes))

    @torch.no_grad()
    def reference(self, features: Tensor | None, prompts: Sequence[str], run: RewardStages) -> dict[str, Tensor]:
        """Return the prompts' unit vectors (B, D)."""
        tokens = self.clip.tokens(prompts).to(next(self.text.parameters()).device)
        serve = run[self.text_stage_name]
        return {"text": torch.cat([serve(tokens=t)["features"] for t in tokens.split(self.prompts_at_once)])}

    def pool(self, features: Tensor, references: Mapping[str, Tensor]) -> RewardScore:
        """Return the scores; all videos can be scored."""
        frames = self.clip.scale * (features * references["text"][:, None]).sum(dim=2)
        score = frames.mean(dim=1)
        return RewardScore(score, torch.ones_like(score, dtype=torch.bool), frame_scores=frames.detach())
