"""The networks of the toy family: a VAE with a temporal stride of 8, and a denoiser with two text inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from frostline.models.block_offload import BlockOffload

CHANNELS, WIDTH, TEXT_LENGTH, VOCABULARY = 4, 32, 8, 128
STRIDE, SIDE = 8, 8


class ToyTextEncoder(nn.Module):
    """A text encoder, which turns token ids (B, L) into a context (B, L, D) and a pooled vector (B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        context = self.embedding(ids)
        return context, context.mean(dim=1)


class ToyVae(nn.Module):
    """A VAE, which encodes single frames, and decodes latents of k + 1 frames to 8k + 1 frames in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, SIDE, SIDE)
        self.up = nn.ConvTranspose3d(CHANNELS, 3, (STRIDE, SIDE, SIDE), (STRIDE, SIDE, SIDE))

    def encode_frame(self, image: Tensor) -> Tensor:
        """Encode frames (B, 3, H, W) to latents (B, C, 1, H/8, W/8)."""
        return self.first(image)[:, :, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, k + 1, H/8, W/8) to a video (B, 3, 8k + 1, H, W).

        The first latent frame decodes to several frames, of which the last is the first frame of the video.
        """
        return self.up(latents)[:, :, STRIDE - 1 :].tanh()


class ToyBlock(nn.Module):
    """Add a layer of tokens, context and time, with tanh, to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + torch.tanh(self.proj(x + shift[:, None]))


def _run(block: nn.Module, x: Tensor, shift: Tensor) -> Tensor:
    return block(x, shift)


class ToyDenoiser(nn.Module):
    """`v(latents, timestep)` given context, pooled text and the latents of the first frame."""

    RUN_SETTINGS = frozenset({"checkpoint_blocks", "offload"})

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(2 * CHANNELS, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(6))
        self.outward = nn.Linear(WIDTH, CHANNELS)
        self.checkpoint_blocks = False
        self.offload: BlockOffload | None = None

    def compile_blocks(self) -> None:
        """Do nothing: no block is worth compiling."""

    @contextmanager
    def first_blocks(self, count: int) -> Iterator[None]:
        blocks = self.blocks
        self.blocks = blocks[:count]
        try:
            yield
        finally:
            self.blocks = blocks

    def forward(
        self, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, first_frame: Tensor
    ) -> Tensor:
        given = first_frame.expand(-1, -1, latents.shape[2], -1, -1)
        x = self.inward(torch.cat([latents, given], dim=1).movedim(1, -1).flatten(1, 3))
        shift = self.time(timestep[:, None] / 1000) + pooled + context.amax(dim=1)
        offload = self.offload
        run = _run if offload is None else partial(offload.run, _run)
        contexts = noop_context_fn if offload is None else offload.contexts
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(run, block, x, shift, use_reentrant=False, context_fn=contexts)
            else:
                x = run(block, x, shift)
        return self.outward(x).unflatten(1, latents.shape[2:]).movedim(-1, 1)


class FrameEncoder(nn.Module):
    """`ToyVae.encode_frame` for tracing."""

    def __init__(self, vae: ToyVae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        return self.vae.encode_frame(image)


class LatentDecoder(nn.Module):
    """`ToyVae.decode` for tracing."""

    def __init__(self, vae: ToyVae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Return token ids (B, L): the first letters of each prompt, padded."""
    rows = [[min(ord(letter), VOCABULARY - 1) for letter in prompt[:TEXT_LENGTH]] for prompt in prompts]
    return torch.tensor([row + [0] * (TEXT_LENGTH - len(row)) for row in rows])
