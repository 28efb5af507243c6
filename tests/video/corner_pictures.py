"""Pictures whose corners show how they are rotated and mirrored."""

import numpy as np
import torch

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(height: int, width: int) -> np.ndarray:
    """Return a uint8 `(H, W, 3)` picture: red and green above blue and white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = RED
    picture[: height // 2, width // 2 :] = GREEN
    picture[height // 2 :, : width // 2] = BLUE
    picture[height // 2 :, width // 2 :] = WHITE
    return picture


def corner_colours(video: torch.Tensor) -> list[tuple[int, ...]]:
    """Return the colours near the four corners of the first frame, rounded to 0 or 255, row by row."""
    frame = (video[0] > 127).to(torch.uint8) * 255
    return [tuple(frame[:, y, x].tolist()) for y in (2, -3) for x in (2, -3)]
