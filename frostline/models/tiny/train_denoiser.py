"""The tiny denoisers and the text encoder, trained together on cached latents; stopped early on purpose.

An under-trained denoiser lets identity fade over the clip, which leaves the reward something to win.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer, WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from torch import Tensor, nn
from tqdm import tqdm

from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.text import TextEncoder, tokenize
from frostline.models.wan.video_shape import MASK_CHANNELS

from .architecture import TRAIN_SHIFT
from .clips import PROMPTS, render_clips
from .training import Phase, autocast, run_phase

_BATCH = 16


@dataclass(frozen=True)
class Pool:
    """N encoded clips: latents and image (of the first frame alone), each (N, C, F, h, w), and prompt (N,)."""

    latents: Tensor
    image: Tensor
    prompt: Tensor

    def y(self, rows: Tensor) -> Tensor:
        """Return (len(rows), 4 + C, F, h, w): the mask and the first frame's latents."""
        image = self.image[rows]
        mask = image.new_zeros(len(rows), MASK_CHANNELS, *image.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, image], dim=1)


@torch.no_grad()
def encode_pool(vae: WanVideoVAE, clips: int) -> Pool:
    """Render and encode `clips` clips."""
    latents, image, prompt = [], [], []
    for seed in tqdm(range(0, clips, 4), desc="encode"):
        batch = render_clips(4, torch.Generator().manual_seed(1_000_000 + seed))
        video = batch.video.transpose(1, 2) * 2 - 1
        first = torch.cat([video[:, :, :1], torch.zeros_like(video[:, :, 1:])], dim=2)
        with autocast():
            latents.append(vae.model.encode(video, vae.scale).float())
            image.append(vae.model.encode(first, vae.scale).float())
        prompt.append(batch.prompt)
    return Pool(torch.cat(latents), torch.cat(image), torch.cat(prompt))


class _TextAndDenoiser(nn.Module):
    """What one optimizer trains; the text encoder only in the first phase."""

    def __init__(self, model: WanModel, text: WanTextEncoder, tokenizer: HuggingfaceTokenizer) -> None:
        super().__init__()
        self.model = model
        self.text = text
        self.denoiser = [Denoiser(model)]  # in a list: its weights are those of `model`, stored once
        self.encoder = [TextEncoder(text)]
        self.ids, self.mask = tokenize(tokenizer, PROMPTS)

    def velocity(self, latents: Tensor, sigma: Tensor, prompt: Tensor, y: Tensor | None) -> Tensor:
        context = self.encoder[0](self.ids[prompt], self.mask[prompt])
        return self.denoiser[0](latents, 1000 * sigma, context, y)


def train_denoiser(
    name: str,
    arguments: dict[str, object],
    text: WanTextEncoder,
    tokenizer: HuggingfaceTokenizer,
    pool: Pool,
    steps: int,
    work: Path,
    *,
    sigma_range: tuple[float, float] = (0.0, 1.0),
    train_text: bool = False,
) -> WanModel:
    """Flow matching at sigmas in `sigma_range`; with a pinned first frame if the model wants one."""
    torch.manual_seed(0)
    model = WanModel(**arguments)  # type: ignore[arg-type]
    both = _TextAndDenoiser(model, text, tokenizer)
    parameters = [*model.parameters(), *(text.parameters() if train_text else ())]
    loss_at = _flow_matching_loss(both, pool, sigma_range)
    phase = Phase(name, both, parameters, steps, learning_rate=1e-3, warmup=30)
    run_phase(phase, loss_at, dict, work)
    return model


def _flow_matching_loss(
    both: _TextAndDenoiser, pool: Pool, sigma_range: tuple[float, float]
) -> Callable[[int, torch.Generator], Tensor]:
    low, high = sigma_range
    pinned = both.denoiser[0].pins_first_frame

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(0, len(pool.latents), (_BATCH,), generator=generator)
        clean = pool.latents[rows]
        u = torch.rand(_BATCH, generator=generator)
        sigma = (TRAIN_SHIFT * u / (1 + (TRAIN_SHIFT - 1) * u)).clamp(low, high)
        noise = torch.randn(clean.shape, generator=generator)
        share = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - share) * clean + share * noise
        if pinned:
            noisy[:, :, :1] = clean[:, :, :1]
        velocity = both.velocity(noisy, sigma, pool.prompt[rows], None if pinned else pool.y(rows))
        given = 1 if pinned else 0
        return F.mse_loss(velocity[:, :, given:], (noise - clean)[:, :, given:])

    return loss_at
