"""Encode batches of prompts to text contexts with diffsynth's `WanTextEncoder` and `HuggingfaceTokenizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer, T5SelfAttention, WanTextEncoder


class TextEncoder(nn.Module):
    """Map token ids to context, which is zero after each prompt's end.

    `WanVideoUnit_PromptEmbedder` of diffsynth does the same for one prompt; in a batch it would truncate every prompt
    to the length of the shortest.
    """

    def __init__(self, model: WanTextEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the context.

        Args:
            ids, mask: (B, L) int64, padded on the right.
        Returns:
            (B, L, text_dim).
        """
        model = self.model
        tokens = model.token_embedding(ids)
        length = ids.shape[1]
        for block in cast("list[T5SelfAttention]", model.blocks):
            embedding = model.pos_embedding or block.pos_embedding  # shared by all blocks, or one in each
            assert embedding is not None
            bias = embedding(length, length)
            tokens = _finite(tokens + block.attn(block.norm1(tokens), mask=mask, pos_bias=bias))
            tokens = _finite(tokens + block.ffn(block.norm2(tokens)))
        context = model.norm(tokens)
        return context * mask[:, :, None].to(context.dtype)


def _finite(tokens: Tensor) -> Tensor:
    """Apply diffsynth's `fp16_clamp`, without its check of the values, which cannot be traced."""
    if tokens.dtype != torch.float16:
        return tokens
    bound = torch.finfo(torch.float16).max - 1000
    return tokens.clamp(-bound, bound)


def count_tokens(tokenizer: HuggingfaceTokenizer, prompt: str) -> int:
    """Return the number of tokens of a prompt before truncation."""
    ids: Any = tokenizer([prompt], padding=False, truncation=False, return_tensors=None, verbose=False)
    return len(ids[0])


def tokenize(tokenizer: HuggingfaceTokenizer, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, both (B, L) int64, with L fixed by the tokenizer."""
    ids, mask = tokenizer(list(prompts), return_mask=True, add_special_tokens=True)
    return ids, mask
