"""A random SCRFD file in the layout of insightface's `scrfd_10g_bnkps`, and exported like it."""

from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallScrfd(nn.Module):
    """A backbone, a top-down path that resizes to the level below, and shared heads with learnt scales."""

    def __init__(self) -> None:
        super().__init__()
        channels = 8
        self.stem = nn.ModuleList([_block(3, 8, 2), _block(8, 8, 2), _block(8, channels, 2)])
        self.levels = nn.ModuleList([_block(channels, channels, 2) for _ in range(2)])
        self.lateral = nn.ModuleList([nn.Conv2d(channels, channels, 1) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Conv2d(channels, 2 * width, 3, padding=1) for width in (1, 4, 10)])
        self.scales = nn.ParameterList([torch.tensor(1.0), torch.tensor(0.9), torch.tensor(1.1)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for block in self.stem:
            x = block(x)
        features = [x]
        for block in self.levels:
            features.append(block(features[-1]))
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for level in (1, 0):
            merged[level] = merged[level] + F.interpolate(
                merged[level + 1], size=merged[level].shape[2:], mode="nearest"
            )
        scores, boxes, points = [], [], []
        for feature, scale in zip(merged, self.scales, strict=True):
            score, box, point = (head(feature).permute(0, 2, 3, 1) for head in self.heads)
            # In insightface's export, the batch is part of the anchor dimension, too.
            scores.append(score.reshape(-1, 1).sigmoid())
            boxes.append((box * scale).reshape(-1, 4))
            points.append(point.reshape(-1, 10))
        return (*scores, *boxes, *points)


def _block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


def scrfd_file(path: Path) -> Path:
    """Write the file: TorchScript export, one frame, dynamic height and width, generic names of outputs."""
    torch.manual_seed(3)
    model = SmallScrfd().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.5)
            if name == "heads.1.bias":
                parameter.add_(1.0)
    torch.onnx.export(
        model,
        (torch.zeros(1, 3, 96, 96),),
        path,
        dynamo=False,
        opset_version=11,
        input_names=["input.1"],
        dynamic_axes={"input.1": {2: "height", 3: "width"}},
    )
    onnx.checker.check_model(str(path))
    return path
