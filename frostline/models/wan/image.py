"""The CLIP image feature of Wan2.1 image-to-video models, around diffsynth's `WanImageEncoder`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffsynth.models.wan_video_image_encoder import WanImageEncoder

# The normalisation of OpenAI's CLIP, the last transform of `WanImageEncoder`.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder(nn.Module):
    """Return the tokens of CLIP's next-to-last block for first frames, without modifying the input."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: WanImageEncoder) -> None:
        super().__init__()
        clip: Any = model.model
        self.visual = clip.visual
        self.image_size: int = clip.image_size
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in [-1, 1] to (B, 257, 1280)."""
        size = (self.image_size, self.image_size)
        image = F.interpolate(image, size=size, mode="bicubic", align_corners=False) * 0.5 + 0.5
        normalised = (image - self.mean.to(image.dtype)) / self.std.to(image.dtype)
        return self.visual(normalised, use_31_block=True)
