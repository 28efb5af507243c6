"""Five-point face alignment: map landmarks to an embedder's template, differentiable with respect to the pixels.

Pixel centres are at integer coordinates, as in OpenCV and insightface: the top left pixel is at (0, 0).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ARCFACE_SIZE = 112
"""Side in pixels of the square crop of `ARCFACE_TEMPLATE`."""

ARCFACE_TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=torch.float64,
)
"""(5, 2) x, y in a crop of 112 by 112 pixels: left eye, right eye, nose, left and right corner of the mouth.

Source: `arcface_dst` of insightface, the alignment that ArcFace-format embedders are trained with.
"""

_SMALLEST_SPREAD = 1e-6
"""Sum of squared distances of the landmarks from their centroid, in square pixels, below which they count as one point.
Dividing by at least this value keeps the scale finite.
"""

_SMALLEST_SCALE = 1e-3
"""Scale, in crop pixels per image pixel, below which landmarks count as degenerate: at this scale, a face would fill
more than 100,000 pixels of the image in width.
"""


def similarity_transform(landmarks: Tensor, template: Tensor) -> Tensor:
    """Return the least-squares rotation, uniform scale and translation from landmarks to a template.

    Closed form of Umeyama (1991), restricted to proper rotations: a mirrored face stays mirrored. For degenerate
    landmarks (all equal, or uncorrelated with the template), the result is the translation of their centroid, so that
    it is always finite and invertible.

    Args:
        landmarks: (N, 5, 2) pixels.
        template: (5, 2) or (N, 5, 2) pixels of the crop.

    Returns:
        (N, 2, 3) float64 affine matrices, image pixels to crop pixels: `crop = M[:, :2] @ image + M[:, 2]`.
    """
    source = landmarks.to(torch.float64)
    target = template.to(source).expand_as(source)
    source_mean, target_mean = source.mean(dim=1), target.mean(dim=1)
    s, t = source - source_mean[:, None], target - target_mean[:, None]

    spread = s.square().sum(dim=(1, 2)).clamp(min=_SMALLEST_SPREAD)
    a = (s * t).sum(dim=(1, 2)) / spread  # scale * cos(angle)
    b = (s[..., 0] * t[..., 1] - s[..., 1] * t[..., 0]).sum(dim=1) / spread  # scale * sin(angle)
    degenerate = torch.hypot(a, b) < _SMALLEST_SCALE
    a = torch.where(degenerate, torch.ones_like(a), a)
    b = torch.where(degenerate, torch.zeros_like(b), b)

    linear = torch.stack([torch.stack([a, -b], dim=1), torch.stack([b, a], dim=1)], dim=1)
    shift = target_mean - (linear @ source_mean[:, :, None])[..., 0]
    return torch.cat([linear, shift[:, :, None]], dim=2)


def align_faces(images: Tensor, landmarks: Tensor, size: int = ARCFACE_SIZE, template: Tensor | None = None) -> Tensor:
    """Crop one face per image so that its landmarks match a template.

    Landmarks get no gradient, because detection has none; pixels do. Outside the image the crop is 0: use images whose
    0 is black to match `cv2.warpAffine`.

    Args:
        images: (N, 3, H, W), any float dtype, any range. Half precision is sampled in float32.
        landmarks: (N, 5, 2) pixels, one face per image.
        size: side of the crop in pixels.
        template: (5, 2) target positions in pixels of the crop; by default the ArcFace template scaled to `size`.

    Returns:
        (N, 3, size, size), float64 for float64 images and float32 otherwise; bilinear, differentiable with respect to
        `images`.
    """
    height, width = images.shape[-2:]
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    if len(images) == 0:  # grid_sample does not support an empty batch
        return images.new_zeros(0, images.shape[1], size, size)
    with torch.no_grad():
        template = scaled_template(size, size) if template is None else template
        transform = similarity_transform(landmarks, template.to(images.device))
        grid = _sampling_grid(transform, size, height, width)
    return F.grid_sample(images, grid.to(images.dtype), "bilinear", "zeros", align_corners=False)


def scaled_template(height: int, width: int) -> Tensor:
    """Return the (5, 2) float64 ArcFace template, stretched from 112×112 to a `height`×`width` image.

    As in insightface, the scaling has no half-pixel shift, because embedders were trained with it.
    """
    return ARCFACE_TEMPLATE * torch.tensor([width / ARCFACE_SIZE, height / ARCFACE_SIZE], dtype=torch.float64)


def _sampling_grid(transform: Tensor, size: int, height: int, width: int) -> Tensor:
    """Return the (N, size, size, 2) grid for `grid_sample` from (N, 2, 3) transforms."""
    a, b = transform[:, 0, 0, None, None], transform[:, 1, 0, None, None]
    steps = torch.arange(size, dtype=transform.dtype, device=transform.device)
    dx = steps[None, None, :] - transform[:, 0, 2, None, None]
    dy = steps[None, :, None] - transform[:, 1, 2, None, None]
    scale_squared = a.square() + b.square()
    x = (a * dx + b * dy) / scale_squared  # the inverse of a similarity is its transpose over its squared scale
    y = (a * dy - b * dx) / scale_squared
    return torch.stack([(x + 0.5) * 2 / width - 1, (y + 0.5) * 2 / height - 1], dim=-1)
