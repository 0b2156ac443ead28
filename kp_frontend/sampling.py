"""Bilinear sampling of maps.

Pixel coordinates throughout: (0, 0) is the centre of the top-left pixel, x to the right, y down.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grid_scale(size: Sequence[int], like: Tensor) -> Tensor:
    """Units of `grid_sample` per pixel along x and y, (2,), of a map of a height and width."""
    # Made on the device: a CUDA graph cannot copy constants from the host.
    axis = torch.arange(2, device=like.device)
    return torch.where(axis == 0, 2 / size[1], 2 / size[0]).to(like.dtype)


def sampling_grid(xy: Tensor, height: int, width: int) -> Tensor:
    """Convert pixels (..., 2) to the range of `grid_sample`, -1..1 over the outer pixel edges."""
    scale = grid_scale((height, width), xy)
    return xy * scale + (scale / 2 - 1)


def pixel_rows(features: Tensor) -> Tensor:
    """Features (B, C, h, w) as (B, h * w, C) float, which is how a CPU's convolutions give them."""
    return features.float().permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def sample_features(
    maps: Sequence[Tensor], strides: Sequence[int], xy: Tensor, width: int
) -> list[Tensor]:
    """Sample maps of features at pixels of images, bilinear. Beyond a map, its border is repeated.

    All channels of a pixel are gathered at once, which is faster than `grid_sample`.

    Args:
        maps: (N, H/stride * W/stride, C) each, from `pixel_rows`.
        strides: of the maps, pixels of the image.
        xy: (N, K, 2) pixels of N images.
        width: W of the images.

    Returns:
        (N, K, C) of each map.
    """
    sizes = [
        (features.shape[1] // (width // stride), width // stride)
        for features, stride in zip(maps, strides, strict=True)
    ]
    places = []
    for (rows, columns), stride in zip(sizes, strides, strict=True):
        x, y = ((xy + 0.5) / stride - 0.5).unbind(-1)
        # Not `clamp`: NaN has to become an index as well.
        x = torch.where(x > 0, x, 0.0).clamp(max=columns - 1)
        y = torch.where(y > 0, y, 0.0).clamp(max=rows - 1)
        places.append(torch.stack([x, y], -1))
    # The coordinates of all maps in one tensor: an engine may use half precision for what only a
    # matrix product needs, as the descriptors' finer features.
    place = torch.stack(places)
    corner = place.floor()
    part, corner = place - corner, corner.long()
    image = torch.arange(len(xy), device=xy.device)[:, None]
    found = []
    for i, ((rows, columns), features) in enumerate(zip(sizes, maps, strict=True)):
        pixels = features.flatten(0, 1)
        left, top = corner[i].unbind(-1)
        right, bottom = (left + 1).clamp(max=columns - 1), (top + 1).clamp(max=rows - 1)
        along, down = (share.flatten()[:, None] for share in part[i].unbind(-1))
        lines = []
        for y in (top, bottom):
            line = (image * rows + y) * columns
            ends = [pixels[(line + x).flatten()] for x in (left, right)]
            lines.append(torch.lerp(ends[0], ends[1], along))
        found.append(torch.lerp(lines[0], lines[1], down).reshape(*xy.shape[:2], -1))
    return found
