"""From the network's outputs to keypoints with descriptors. Fixed shapes, no host synchronisation.

Pixel coordinates throughout: (0, 0) is the centre of the top-left pixel, x to the right, y down.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kp_frontend.network import CELL

BLOCK = 4  # side of the blocks of which each gives one candidate for the top K, pixels
REFINE_RADIUS = 2  # of the window whose centroid is the sub-pixel position, pixels


def heatmap(logits: Tensor) -> Tensor:
    """Keypoint probability of each pixel, (B, H, W), from cell logits (B, 65, H/8, W/8)."""
    cells = logits.float().softmax(1)[:, : CELL * CELL]
    return F.pixel_shuffle(cells, CELL)[:, 0]


def max_filter(values: Tensor, radius: int) -> Tensor:
    """Maximum over the square window of each pixel, (B, H, W), of values that are not negative.

    Columns, then rows, each by doubling the span of a running maximum: CPU engines have no fast
    max-pooling for images of one channel.
    """
    side = 2 * radius + 1
    values = F.pad(values, (radius, radius, radius, radius))
    for dim in (1, 2):
        span = 1
        while span < side:
            step = min(span, side - span)
            length = values.shape[dim] - step
            values = torch.maximum(values.narrow(dim, 0, length), values.narrow(dim, step, length))
            span += step
    return values


def suppress(heat: Tensor, radius: int, rounds: int = 2) -> Tensor:
    """Non-maximum suppression: the heatmap (B, H, W) with all but local maxima set to 0.

    Greedy suppression keeps the strongest pixel, discards its neighbours within `radius` rows and
    columns, and goes on with what is left. Here each round keeps all pixels that are the largest
    of their window among those left, which is what greedy would keep, and discards their
    neighbours; `rounds` bounds how long a chain of ever weaker neighbours is followed.
    """
    kept = torch.zeros_like(heat, dtype=torch.bool)
    left = heat
    for _ in range(rounds):
        kept = kept | ((left == max_filter(left, radius)) & (left > 0))
        near = max_filter(kept.to(heat.dtype), radius) > 0
        left = torch.where(near, 0.0, heat)
    return torch.where(kept, heat, 0.0)


def top_keypoints(heat: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` strongest pixels after suppression with a radius of at least 3.

    Suppression leaves at most one pixel in a 4x4 block, so the search runs over blocks.

    Args:
        heat: (B, H, W), H and W multiples of 4; 0 where there is no keypoint.

    Returns:
        Scores (B, count) in falling order, 0 where there are fewer keypoints, and pixel positions
        (B, count, 2) int64, x and y.
    """
    blocks = F.pixel_unshuffle(heat[:, None], BLOCK)
    columns = blocks.shape[3]
    scores, block = blocks.amax(1).flatten(1).topk(count, dim=1)
    inside = blocks.flatten(2).gather(2, block[:, None].expand(-1, BLOCK * BLOCK, -1)).argmax(1)
    row, inside_row = block // columns, inside // BLOCK
    x = (block - row * columns) * BLOCK + inside - inside_row * BLOCK
    y = row * BLOCK + inside_row
    return scores, torch.stack([x, y], -1)


def refine(heat: Tensor, pixels: Tensor) -> Tensor:
    """Sub-pixel positions (B, K, 2): the centroid of the 5x5 heatmap window around each pixel."""
    width = heat.shape[2]
    r = REFINE_RADIUS
    padded = F.pad(heat, (r, r, r, r))
    side, stride = 2 * r + 1, width + 2 * r
    steps = torch.arange(side, device=heat.device)  # from the window's top left corner
    dy, dx = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    corner = pixels[..., 1] * stride + pixels[..., 0]
    place = corner[..., None] + dy * stride + dx
    window = padded.flatten(1).gather(1, place.flatten(1)).reshape(place.shape)
    offsets = torch.stack([dx, dy], -1).to(heat.dtype) - r
    total = window.sum(-1, keepdim=True).clamp(min=1e-9)
    return pixels.to(heat.dtype) + window @ offsets / total


def sample_descriptors(descriptors: Tensor, xy: Tensor) -> Tensor:
    """Unit descriptors (B, K, D) at pixels (B, K, 2) from the map (B, D, H/8, W/8)."""
    size = (CELL * descriptors.shape[3], CELL * descriptors.shape[2])
    grid = (xy + 0.5) * xy.new_tensor([2 / size[0], 2 / size[1]]) - 1
    found = F.grid_sample(
        descriptors.float(), grid[:, None], "bilinear", "border", align_corners=False
    )
    return F.normalize(found[:, :, 0].transpose(1, 2), dim=-1)


def detect(
    logits: Tensor,
    descriptors: Tensor,
    size: tuple[int, int],
    count: int,
    radius: int,
    border: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints of each image of a batch, strongest first.

    Args:
        logits, descriptors: the network's outputs.
        size: height and width of the image proper; what lies beyond is padding.
        count: K, the fixed number of rows in the results.
        radius: of non-maximum suppression, pixels, at least 3.
        border: width of the frame in which no keypoint is reported, pixels.

    Returns:
        Positions (B, K, 2), scores (B, K) and unit descriptors (B, K, D). Rows without a keypoint
        come last and have score 0.
    """
    height, width = size
    heat = heatmap(logits)
    inner = torch.zeros_like(heat)
    inner[:, border : height - border, border : width - border] = 1.0
    scores, pixels = top_keypoints(suppress(heat * inner, radius), count)
    xy = refine(heat, pixels)
    return xy, scores, sample_descriptors(descriptors, xy)
