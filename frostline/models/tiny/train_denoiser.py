"""Train the tiny denoisers and the text encoder on cached latents of clips whose identity drifts.

The trained model generates sharp clips in which the face changes to the other person's, so that a reward can visibly
improve it. It is trained on clips with any amount of drift, so that it can also preserve the identity, and finally
fine-tuned on the clips with the largest drift.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer, WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from frostline.atomic_io import atomic_write
from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.text import TextEncoder, tokenize
from frostline.models.wan.vae import use_onednn_conv3d
from frostline.models.wan.video_shape import MASK_CHANNELS

from .architecture import TRAIN_SHIFT
from .clips import PROMPTS, render_clips
from .training import Phase, autocast, run_phase

_BATCH = 16


@dataclass(frozen=True)
class Pool:
    """N encoded clips.

    Attributes:
        latents: the latents of the clips, (N, C, F, h, w).
        image: the latents of the first frames alone, (N, C, F, h, w).
        prompt: the indices of the prompts, (N,).
        drift: the drift of the clips, (N,).
    """

    latents: Tensor
    image: Tensor
    prompt: Tensor
    drift: Tensor

    def drifting(self, at_least: float) -> "Pool":
        """Return the clips whose drift at the last frame is at least `at_least`, from 0 to 1."""
        rows = self.drift >= at_least
        return Pool(self.latents[rows], self.image[rows], self.prompt[rows], self.drift[rows])

    def y(self, rows: Tensor) -> Tensor:
        """Return (len(rows), 4 + C, F, h, w): the mask and the first frame's latents."""
        image = self.image[rows]
        mask = image.new_zeros(len(rows), MASK_CHANNELS, *image.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, image], dim=1)


@torch.no_grad()
def encode_pool(vae: WanVideoVAE, clips: int, work: Path) -> Pool:
    """Render and encode `clips` clips, or read them from `work`. About 31 % of the clips have a drift below 2/3."""
    encoded = work / f"pool_{clips}.safetensors"
    if encoded.exists():
        return Pool(**load_file(encoded))
    use_onednn_conv3d(vae.model)
    latents, image, prompt, drifts = [], [], [], []
    for seed in tqdm(range(0, clips, 4), desc="encode"):
        generator = torch.Generator().manual_seed(1_000_000 + seed)
        drift = 1 - torch.rand(4, generator=generator) ** 3
        batch = render_clips(4, generator, drift=drift)
        video = batch.video.transpose(1, 2) * 2 - 1
        first = torch.cat([video[:, :, :1], torch.zeros_like(video[:, :, 1:])], dim=2)
        with autocast():
            latents.append(vae.model.encode(video, vae.scale).float())
            image.append(vae.model.encode(first, vae.scale).float())
        prompt.append(batch.prompt)
        drifts.append(drift)
    pool = Pool(torch.cat(latents), torch.cat(image), torch.cat(prompt), torch.cat(drifts))
    with atomic_write(encoded) as part:
        save_file(vars(pool), part)
    return pool


class _TextAndDenoiser(nn.Module):
    """Text encoder and denoiser in one module. The text encoder is only trained in the first phase."""

    def __init__(self, model: WanModel, text: WanTextEncoder, tokenizer: HuggingfaceTokenizer) -> None:
        super().__init__()
        self.model = model
        self.text = text
        self.denoiser = [Denoiser(model)]  # in a list, so that the state dict contains its weights only once
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
    start: WanModel | None = None,
    learning_rate: float = 1.5e-3,
) -> WanModel:
    """Train a denoiser with flow matching at sigmas in `sigma_range`, with a fixed first frame if the model uses one.

    Args:
        name: name of the training phase and its checkpoint.
        arguments: arguments of `WanModel` for a new model.
        steps: number of optimizer steps.
        work: folder of checkpoints.
        train_text: whether to train the text encoder as well, in place.
        start: a model to train in place, instead of a new one.
        learning_rate: peak learning rate.
    """
    torch.manual_seed(0)
    model = WanModel(**arguments) if start is None else start  # type: ignore[arg-type]
    both = _TextAndDenoiser(model, text, tokenizer)
    parameters = [*model.parameters(), *(text.parameters() if train_text else ())]
    loss_at = _flow_matching_loss(both, pool, sigma_range)
    phase = Phase(name, both, parameters, steps, learning_rate, warmup=min(100, 1 + steps // 5))
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
