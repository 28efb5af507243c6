"""Prompts to text context, batched, around diffsynth's `WanTextEncoder` and `HuggingfaceTokenizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer, WanTextEncoder


class TextEncoder(nn.Module):
    """Token ids to context, zero past each prompt's end.

    `WanVideoUnit_PromptEmbedder` of diffsynth does the same for one prompt; for a batch it would cut every prompt
    at the length of the shortest.
    """

    def __init__(self, model: WanTextEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode.

        Args:
            ids, mask: (B, L) int64, padded on the right.
        Returns:
            (B, L, text_dim).
        """
        context = self.model(ids, mask)
        return context * mask[:, :, None].to(context.dtype)


def tokenize(tokenizer: HuggingfaceTokenizer, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, L) int64, L fixed by the tokenizer."""
    ids, mask = tokenizer(list(prompts), return_mask=True, add_special_tokens=True)
    return ids, mask
