"""Five-point alignment: the transform, the crop, and the gradient of the pixels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from frostline.models.faces import ARCFACE_TEMPLATE, align_faces, similarity_transform


def transformed(points: Tensor, scale: float, angle: float, x: float, y: float) -> Tensor:
    a, b = scale * math.cos(angle), scale * math.sin(angle)
    rotation = torch.tensor([[a, -b], [b, a]], dtype=torch.float64)
    return points @ rotation.T + torch.tensor([x, y], dtype=torch.float64)


@given(
    scale=st.floats(0.05, 20),
    angle=st.floats(-math.pi, math.pi),
    x=st.floats(-500, 500),
    y=st.floats(-500, 500),
)
@settings(max_examples=60, deadline=None)
def test_recovers_a_known_similarity(scale: float, angle: float, x: float, y: float) -> None:
    landmarks = transformed(ARCFACE_TEMPLATE, scale, angle, x, y)[None]
    transform = similarity_transform(landmarks, ARCFACE_TEMPLATE)
    back = landmarks @ transform[:, :, :2].mT + transform[:, None, :, 2]
    torch.testing.assert_close(back[0], ARCFACE_TEMPLATE, atol=1e-7, rtol=0)
    linear = transform[0, :, :2]
    torch.testing.assert_close(torch.linalg.det(linear), torch.tensor(scale**-2, dtype=torch.float64))


@given(noise=st.lists(st.floats(-15, 15), min_size=10, max_size=10), step=st.sampled_from([0, 1, 2, 3]))
@settings(max_examples=40, deadline=None)
def test_is_the_least_squares_fit(noise: list[float], step: int) -> None:
    landmarks = ARCFACE_TEMPLATE[None] * 1.7 + torch.tensor(noise, dtype=torch.float64).reshape(1, 5, 2)
    transform = similarity_transform(landmarks, ARCFACE_TEMPLATE)[0]

    def error(a: Tensor, b: Tensor, shift: Tensor) -> Tensor:
        linear = torch.stack([torch.stack([a, -b]), torch.stack([b, a])])
        return (landmarks[0] @ linear.T + shift - ARCFACE_TEMPLATE).square().sum()

    parameters = [transform[0, 0], transform[1, 0], transform[:, 2]]
    nudged = [p.clone() for p in parameters]
    index = min(step, 2)
    nudged[index] += 1e-3
    assert error(*parameters) <= error(*nudged) + 1e-12


def test_crops_what_the_template_shows() -> None:
    """Check where each crop pixel is sampled, with pixels whose values are their own coordinates."""
    H, W = 160, 200
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    image = torch.stack([x, y, torch.zeros_like(x)]).double()[None]
    landmarks = transformed(ARCFACE_TEMPLATE, 0.6, 0.3, 70, 20)[None]
    crop = align_faces(image, landmarks)
    transform = similarity_transform(landmarks, ARCFACE_TEMPLATE)[0]
    sampled = crop[0, :2].permute(1, 2, 0)[50:70, 40:80]
    v, u = torch.meshgrid(torch.arange(50, 70), torch.arange(40, 80), indexing="ij")
    expected = torch.stack([u, v], dim=-1).double()
    torch.testing.assert_close(sampled @ transform[:, :2].T + transform[:, 2], expected, atol=1e-6, rtol=0)


def test_landmarks_go_to_the_template_of_the_embedder() -> None:
    """Align to the landmarks themselves, to a moved template, and to the default template in a smaller crop."""
    image = torch.rand(1, 3, 60, 60, generator=torch.Generator().manual_seed(0)).double()
    template = transformed(ARCFACE_TEMPLATE, 0.4, -0.2, 5, 8)
    torch.testing.assert_close(align_faces(image, template[None], 60, template), image)
    moved = align_faces(image, template[None], 60, template + torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(moved[..., 2:, 3:], image[..., :-2, :-3])
    torch.testing.assert_close(
        align_faces(image, template[None], 56), align_faces(image, template[None], 56, ARCFACE_TEMPLATE / 2)
    )


def test_template_landmarks_change_nothing() -> None:
    image = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    landmarks = ARCFACE_TEMPLATE.float().expand(2, 5, 2)
    torch.testing.assert_close(align_faces(image, landmarks), image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_sampled_in_float32(dtype: torch.dtype) -> None:
    image = torch.rand(1, 3, 40, 40).to(dtype)
    landmarks = ARCFACE_TEMPLATE[None] * 0.3
    crop = align_faces(image, landmarks)
    assert crop.dtype == torch.float32
    assert torch.equal(crop, align_faces(image.float(), landmarks))


def test_outside_is_zero_and_empty_batches_pass() -> None:
    crop = align_faces(torch.ones(1, 3, 40, 40), ARCFACE_TEMPLATE[None] * 0.3 + 1000)
    assert crop.eq(0).all()
    assert align_faces(torch.ones(0, 3, 40, 40), torch.zeros(0, 5, 2), size=160).shape == (0, 3, 160, 160)


def test_gradient_to_the_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 9, 11, dtype=torch.float64, generator=generator, requires_grad=True)
    landmarks = ARCFACE_TEMPLATE * 0.08 + torch.rand(2, 5, 2, generator=generator)
    assert torch.autograd.gradcheck(lambda x: align_faces(x, landmarks, size=8), image)


@pytest.mark.parametrize(
    "landmarks",
    [
        torch.full((5, 2), 7.0),
        torch.full((5, 2), 7.0) + torch.arange(10.0).reshape(5, 2) * 1e-6,
        torch.zeros(5, 2),
        ARCFACE_TEMPLATE.flip(0).float() * torch.tensor([0.1, 0.1]),
        torch.tensor([[0.0, 0], [1, 0], [0, 0], [1, 0], [0, 0]]),
        ARCFACE_TEMPLATE.float() * 1e6,
    ],
    ids=["one point", "nearly one point", "origin", "upside down", "line", "huge"],
)
def test_degenerate_landmarks_stay_finite(landmarks: Tensor) -> None:
    image = torch.rand(1, 3, 20, 30, requires_grad=True)
    crop = align_faces(image, landmarks[None])
    crop.square().sum().backward()
    assert crop.isfinite().all()
    assert image.grad is not None and image.grad.isfinite().all()
