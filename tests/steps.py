"""Training steps of the tests, and checks that two steps are the same."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frostline.models.tiny.clips import held_out_clips
from frostline.train import WanTrainingModule
from frostline.train.data.dataset import Sample

if TYPE_CHECKING:
    from conftest import RewardTape

# Three Euler steps, for clips of 32×32 pixels and tests that do not depend on the content of the pictures.
QUICK: dict[str, Any] = {"num_inference_steps": 3, "grad_start_step": 1, "grad_end_step": 2}


def clips(count: int, seed: int = 0, **size: int) -> dict[str, Any]:
    held_out = held_out_clips(count, seed, **size)
    return {"prompt": held_out.prompts, "video": held_out.video}


def small_clips(count: int, seed: int = 0) -> dict[str, Any]:
    return clips(count, seed, num_frames=5, size=32)


class Clips(torch.utils.data.Dataset[Sample]):
    """Validation clips as a dataset; with seven clips and batches of two, epochs end within a batch."""

    def __init__(self, count: int = 7, seed: int = 2, num_frames: int = 5, size: int = 32) -> None:
        self.clips = held_out_clips(count, seed, num_frames=num_frames, size=size)

    def __len__(self) -> int:
        return len(self.clips.video)

    def __getitem__(self, index: int) -> Sample:
        return {"sample_id": f"clip {index}", "prompt": self.clips.prompts[index], "video": self.clips.video[index]}


def row(data: dict[str, Any], index: int) -> dict[str, Any]:
    return {"prompt": [data["prompt"][index]], "video": data["video"][index : index + 1]}


def gradient(module: WanTrainingModule) -> Tensor:
    """Return the flat gradient of all LoRA matrices, and delete it."""
    parts = []
    for parameter in module.trainable_parameters().values():
        assert parameter.grad is not None
        parts.append(parameter.grad.flatten())
        parameter.grad = None
    return torch.cat(parts).double()


def assert_same_step(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    """Compare loss, face_score and kl_loss."""
    for one, other in zip(expected, actual, strict=True):
        assert (one - other).abs().item() <= tolerance


def assert_same_gradient(expected: Tensor, actual: Tensor, norm: float = 1e-4) -> None:
    assert torch.nn.functional.cosine_similarity(expected, actual, dim=0) >= 0.99999
    assert (actual.norm() / expected.norm() - 1).abs() <= norm


def assert_hybrid_is_pytorch(module: WanTrainingModule, hybrid: WanTrainingModule, data: dict[str, Any]) -> None:
    """Compare forward and backward of the same step, with rewards that are differentiable everywhere."""
    expected = module(data)
    expected[0].backward()
    actual = hybrid(data)
    actual[0].backward()
    assert_same_step(expected, actual)
    assert_same_gradient(gradient(module), gradient(hybrid))


def assert_same_steps(
    module: WanTrainingModule, other: WanTrainingModule, data: dict[str, Any], tape: "RewardTape"
) -> None:
    """Compare forward and backward of the same step, with the face reward."""
    with tape.record(module):
        expected = module(data)
    expected[0].backward()
    expected_gradient = gradient(module)
    with tape.replay(other):
        actual = other(data)
    assert_same_step(expected, actual)
    actual[0].backward(retain_graph=True)
    # `RewardTape` describes the effect of the embedder's PReLUs on the norm.
    assert_same_gradient(expected_gradient, gradient(other), norm=1e-3)
    tape.holds_gradient = True
    actual[0].backward()
    assert_same_gradient(expected_gradient, gradient(other))
    assert module.last_metrics is not None
    assert other.last_metrics is not None
    assert other.last_metrics.per_sample["detection_rate"] == module.last_metrics.per_sample["detection_rate"]
