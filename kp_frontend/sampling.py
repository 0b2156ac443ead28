"""Values of maps between their pixels.

Pixel coordinates throughout: (0, 0) is the centre of the top-left pixel, x to the right, y down.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sampling_grid(xy: Tensor, height: int, width: int) -> Tensor:
    """Pixels (..., 2) of an image as `grid_sample` wants them, -1..1 over the outer pixel edges."""
    x, y = xy.unbind(-1)
    return torch.stack([(x + 0.5) * (2 / width) - 1, (y + 0.5) * (2 / height) - 1], -1)


def sample_features(features: Tensor, xy: Tensor, stride: int) -> Tensor:
    """Features (B, K, C) at pixels (B, K, 2) of an image, bilinear, from a map of 1/`stride` of its
    resolution, (B, C, H/stride, W/stride); beyond the map its border goes on."""
    grid = sampling_grid(xy, stride * features.shape[2], stride * features.shape[3])
    found = F.grid_sample(
        features.float(), grid[:, None], "bilinear", "border", align_corners=False
    )
    return found[:, :, 0].transpose(1, 2)
