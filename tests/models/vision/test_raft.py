"""RAFT compared with torchvision's own forward: the flow, and its gradient with respect to both pictures."""

from pathlib import Path

import pytest
import torch
from raft_file import raft_file
from torch import Tensor
from torchvision.models.optical_flow import RAFT

from frostline.errors import ConfigError
from frostline.models.vision.raft import FlowSize, RaftFlow, load_raft

UPDATES = 2


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[RAFT, Path]:
    path = tmp_path_factory.mktemp("raft") / "raft.pth"
    return raft_file(path), path


@pytest.fixture(scope="module")
def network(published: tuple[RAFT, Path]) -> RaftFlow:
    return load_raft(published[1], UPDATES)


def pairs(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return two pairs of pictures; the second pictures are the first ones, moved and slightly changed."""
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
    return first, first.roll((2, 3), (2, 3)) + 0.05 * torch.randn(first.shape, generator=generator)


def test_flow_and_gradient_are_torchvisions(published: tuple[RAFT, Path], network: RaftFlow) -> None:
    towards = torch.randn(2, 2, 128, 136, generator=torch.Generator().manual_seed(2))
    flows, gradients = [], []
    for compute in (lambda *images: published[0](*images, num_flow_updates=UPDATES)[-1], network):
        images = [picture.requires_grad_() for picture in pairs(128, 136)]
        flow = compute(*images)
        flows.append(flow.detach())
        gradients.append(torch.autograd.grad((flow * towards).sum(), images))
    assert flows[0].abs().mean() > 0.5
    torch.testing.assert_close(flows[1], flows[0], atol=2e-4, rtol=1e-4)
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    assert not any(p.requires_grad for p in network.parameters())


def test_a_safetensors_file_does_as_well_and_no_random_number_is_drawn(tmp_path: Path, network: RaftFlow) -> None:
    raft_file(tmp_path / "raft.safetensors")
    state = torch.get_rng_state()
    loaded = load_raft(tmp_path / "raft.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.updates == 12
    expected = network.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_other_weights_are_refused(tmp_path: Path, published: tuple[RAFT, Path]) -> None:
    weights = published[0].state_dict()
    name = "context_encoder.conv.bias"
    for change, message in (
        ({name: None}, f"{name} is missing, expected \\(160,\\)"),
        ({name: torch.zeros(3)}, f"{name} has shape \\(3,\\), expected \\(160,\\)"),
        (
            {"mask_predictor.conv.bias": torch.zeros(3)},
            "mask_predictor.conv.bias has shape \\(3,\\), expected no such tensor",
        ),
    ):
        changed = {key: value for key, value in {**weights, **change}.items() if value is not None}
        torch.save(changed, tmp_path / "raft.pth")
        with pytest.raises(ConfigError, match=f"raft.pth does not contain the weights of .*raft_small: {message}"):
            load_raft(tmp_path / "raft.pth")
    torch.save(["no", "weights"], tmp_path / "raft.pth")
    with pytest.raises(ConfigError, match="contains something other than named tensors"):
        load_raft(tmp_path / "raft.pth")
    torch.save({"module": published[0]}, tmp_path / "raft.pth")
    with pytest.raises(ConfigError, match="cannot read weights from"):  # it would run code
        load_raft(tmp_path / "raft.pth")
    with pytest.raises(ConfigError, match=r"cannot read weights from .*gone\.pth"):
        load_raft(tmp_path / "gone.pth")


@pytest.mark.parametrize(
    ("frame", "shortest", "resized", "padded"),
    [
        ((480, 832), None, (480, 832), (480, 832)),
        ((64, 96), None, (128, 192), (128, 192)),
        ((100, 130), None, (128, 166), (128, 168)),
        ((1080, 1920), 256, (256, 455), (256, 456)),
        ((300, 200), 130, (195, 130), (200, 136)),
    ],
)
def test_sizes(frame: tuple[int, int], shortest: int | None, resized: tuple[int, int], padded: tuple[int, int]) -> None:
    size = FlowSize.of(*frame, shortest)
    assert (size.height, size.width) == resized
    prepared = size.prepare(torch.full((1, 3, *frame), 0.75))
    assert prepared.shape[-2:] == (size.padded_height, size.padded_width) == padded
    torch.testing.assert_close(prepared, torch.full_like(prepared, 0.5))


def test_motion_is_a_share_of_the_diagonal_of_what_is_seen() -> None:
    size = FlowSize.of(150, 200, None)
    flow = torch.full((2, 2, size.padded_height, size.padded_width), 1e6)
    flow[:, 0, :150, :200], flow[:, 1, :150, :200] = 3.0, torch.tensor([4.0, 0.0])[:, None, None]
    torch.testing.assert_close(size.motion(flow), torch.tensor([5 / 250, 3 / 250]))
    still = torch.zeros(1, 2, 152, 200, requires_grad=True)
    size.motion(still).sum().backward()
    assert still.grad is not None and still.grad.isfinite().all()
