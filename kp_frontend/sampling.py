"""Bilinear sampling of maps.

Pixel coordinates throughout: (0, 0) is the centre of the top-left pixel, x to the right, y down.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sampling_grid(xy: Tensor, height: int, width: int) -> Tensor:
    """Convert pixels (..., 2) to the range of `grid_sample`, -1..1 over the outer pixel edges."""
    x, y = xy.unbind(-1)
    return torch.stack([(x + 0.5) * (2 / width) - 1, (y + 0.5) * (2 / height) - 1], -1)


def sample_features(features: Tensor, xy: Tensor, stride: int) -> Tensor:
    """Sample features at pixels of an image, bilinear. Beyond the map, its border is repeated.

    Args:
        features: (B, C, H/stride, W/stride), a map at 1/`stride` of the image resolution.
        xy: (B, K, 2) pixels of the image.

    Returns:
        (B, K, C).
    """
    grid = sampling_grid(xy, stride * features.shape[2], stride * features.shape[3])
    found = F.grid_sample(
        features.float(), grid[:, None], "bilinear", "border", align_corners=False
    )
    return found[:, :, 0].transpose(1, 2)
