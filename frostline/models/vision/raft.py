"""RAFT optical flow with torchvision's networks and weights, as one module that engines can be built from.

Method: Teed and Deng 2020, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow". torchvision's `RAFT` stores
the correlations of the last call in the module and returns the flow of every update; this module returns only the
last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.errors import ConfigError
from frostline.models.weight_files import read_weights

STRIDE = 8
"""Pixels per entry of the features; sides of images must be multiples of it."""

SMALLEST_SIDE = 128
"""The correlations are halved three times, and at least two entries must remain."""

_LEVELS, _RADIUS = 4, 3


class RaftFlow(nn.Module):
    """The small RAFT network: flow from the first image of a pair to the second.

    Args:
        updates: number of refinements of the flow.
    """

    def __init__(self, updates: int = 12) -> None:
        super().__init__()
        from torchvision.models.optical_flow import raft_small

        # On the meta device, so that no random numbers are generated.
        with torch.device("meta"):
            network = raft_small(weights=None)
        self.feature_encoder = network.feature_encoder
        self.context_encoder = network.context_encoder
        self.update_block = network.update_block
        self.updates = updates

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Map (N, 3, H, W) RGB in [-1, 1], H and W multiples of 8 and at least 128, to (N, 2, H, W): x, y in pixels."""
        count, _, height, width = first.shape
        features, target = self.feature_encoder(first), self.feature_encoder(second)
        pyramid = _correlations(features, target)
        hidden, context = self.context_encoder(first).split(
            [self.update_block.hidden_state_size, self._context_channels()], dim=1
        )
        hidden, context = hidden.tanh(), context.relu()
        start = _places(features)
        places = start.expand(count, -1, -1, -1)
        for _ in range(self.updates):
            # As in the paper (section 3.3), no gradient flows through the positions of the previous update.
            places = places.detach()
            found = _look_up(pyramid, places)
            hidden, change = self.update_block(hidden, context, found, places - start)
            places = places + change
        return STRIDE * F.interpolate(places - start, (height, width), mode="bilinear", align_corners=True)

    def _context_channels(self) -> int:
        return self.context_encoder.output_dim - self.update_block.hidden_state_size


def load_raft(path: Path, updates: int = 12) -> RaftFlow:
    """Load the weights of torchvision's `raft_small`, frozen.

    Args:
        path: a .pth or .safetensors file with torchvision's names.
    Raises:
        ConfigError: the file cannot be read, or its weights are of another network.
    """
    weights = read_weights(path)
    network = RaftFlow(updates)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            shape = f"has shape {found[name]}" if name in found else "is missing"
            raise ConfigError(
                f"{path} does not contain the weights of torchvision's raft_small: {name} {shape}, "
                f"expected {expected.get(name, 'no such tensor')}"
            )
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return network.eval().requires_grad_(False)


def _correlations(features: Tensor, target: Tensor) -> list[Tensor]:
    """Return a pyramid of the correlations of all pairs of entries of (N, C, h, w) features.

    The first level is (N·h·w, 1, h, w); each of three further levels has half the height and width of the previous one.
    """
    count, channels, height, width = features.shape
    products = features.flatten(2).transpose(1, 2) @ target.flatten(2) / channels**0.5
    pyramid = [products.reshape(count * height * width, 1, height, width)]
    for _ in range(_LEVELS - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid


def _look_up(pyramid: list[Tensor], places: Tensor) -> Tensor:
    """Return (N, levels · 49, h, w) correlations around each of (N, 2, h, w) positions, 7×7 at each level."""
    count, _, height, width = places.shape
    steps = torch.arange(-_RADIUS, _RADIUS + 1, device=places.device, dtype=places.dtype)
    # The window is transposed, with x along its rows: the order that the weights were trained with.
    around = torch.stack([steps[:, None].expand(-1, len(steps)), steps.expand(len(steps), -1)], dim=-1)
    centres = places.permute(0, 2, 3, 1).reshape(count * height * width, 1, 1, 2)
    found = []
    for level, products in enumerate(pyramid):
        window = centres / 2**level + around
        rows, columns = products.shape[-2:]
        grid = torch.stack([2 * window[..., 0] / (columns - 1) - 1, 2 * window[..., 1] / (rows - 1) - 1], dim=-1)
        sampled = F.grid_sample(products, grid, align_corners=True)
        found.append(sampled.reshape(count, height, width, around[..., 0].numel()))
    return torch.cat(found, dim=-1).permute(0, 3, 1, 2).contiguous()


def _places(features: Tensor) -> Tensor:
    """Return (1, 2, h, w): x, y of each entry."""
    height, width = features.shape[-2:]
    y = torch.arange(height, device=features.device, dtype=features.dtype)
    x = torch.arange(width, device=features.device, dtype=features.dtype)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


@dataclass(frozen=True)
class FlowSize:
    """The input size of the network.

    Attributes:
        height, width: size to which images are resized.
        padded_height, padded_width: size after repeating the last row and column.
    """

    height: int
    width: int

    @classmethod
    def of(cls, height: int, width: int, shortest: int | None) -> FlowSize:
        """Return the size for the aspect ratio of the pictures.

        Args:
            height, width: size of the images in pixels.
            shortest: shortest side in pixels; by default images are not resized, unless they are too small.
        """
        short = min(height, width)
        wanted = max(short, SMALLEST_SIDE) if shortest is None else shortest
        return cls(*(max(wanted, round(side * wanted / short)) for side in (height, width)))

    @property
    def padded_height(self) -> int:
        return -(-self.height // STRIDE) * STRIDE

    @property
    def padded_width(self) -> int:
        return -(-self.width // STRIDE) * STRIDE

    def prepare(self, frames: Tensor) -> Tensor:
        """Return (N, 3, H, W) frames in [0, 1] as network input, differentiable."""
        pictures = frames.float()
        if pictures.shape[-2:] != (self.height, self.width):
            pictures = F.interpolate(
                pictures, (self.height, self.width), mode="bilinear", align_corners=False, antialias=True
            )
        missing = (0, self.padded_width - self.width, 0, self.padded_height - self.height)
        return F.pad(pictures * 2 - 1, missing, mode="replicate")

    def motion(self, flow: Tensor) -> Tensor:
        """Return the (N,) mean length of (N, 2, h, w) flow as a fraction of the diagonal, without the padding."""
        seen = flow[..., : self.height, : self.width]
        return torch.linalg.vector_norm(seen, dim=1).mean(dim=(1, 2)) / (self.height**2 + self.width**2) ** 0.5
