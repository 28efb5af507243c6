"""Random weights of RAFT in torchvision's layout: the flow is not zero for any pictures, and larger if they move."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torchvision.models.optical_flow import RAFT, raft_small


def raft_file(path: Path) -> RAFT:
    """Write the file, .pth or .safetensors, and return torchvision's own network with these weights."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    network = raft_small(weights=None).eval().requires_grad_(False)
    torch.set_rng_state(state)
    save_file(network.state_dict(), path) if path.suffix == ".safetensors" else torch.save(network.state_dict(), path)
    return network
