"""From the network's logits to keypoints. Fixed shapes, no host synchronisation.

Nor are constants copied from the host (no `new_tensor`): a CUDA graph could not capture it.

Pixel coordinates throughout: (0, 0) is the centre of the top-left pixel, x to the right, y down.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# A score and a place in a block, packed in one number: 24 bits, which float32 holds exactly. Powers
# of two, so that unpacking is exact where an engine divides by multiplying with the reciprocal.
LEVELS = 2**19
PLACES = 2**4
REFINE_RADIUS = 2  # of the window whose centroid is the sub-pixel position, pixels


def heatmap(logits: Tensor) -> Tensor:
    """Keypoint probability of each pixel, (B, H, W), from the network's logits (B, 1, H, W)."""
    return logits[:, 0].float().sigmoid()


def mean_heat(heat: Tensor) -> Tensor:
    """Mean heat of the 3x3 pixels around each pixel, (B, H, W) in 0..1; beyond the image it is 0.

    By this keypoints are ranked. A keypoint between pixels is spread over up to four of them: the
    height of its peak alone says how it falls on the pixel grid, which differs between views.
    """
    padded = F.pad(heat, (1, 1, 1, 1))
    rows = padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def block_side(radius: int) -> int:
    """Side of the blocks of which each gives one candidate: none holds two keypoints; and not more
    than 4, so that score and place in the block fit one float32."""
    return min(radius + 1, 4)


def block_peaks(heat: Tensor, side: int) -> Tensor:
    """The strongest pixel of each block, (B, h, w), score and place in one number.

    A peak is `floor(score * LEVELS) * PLACES + place`, place being side * y + x in the block, so
    one maximum finds both. Scores are rounded down by 2e-6 at most.

    Args:
        heat: (B, H, W) in 0..1.
    """
    beyond = (0, -heat.shape[2] % side, 0, -heat.shape[1] % side)
    blocks = F.pixel_unshuffle(F.pad(heat[:, None], beyond), side)
    place = torch.arange(side * side, device=heat.device, dtype=heat.dtype)[:, None, None]
    return ((blocks * LEVELS).floor() * PLACES + place).amax(1)


def unpack(peaks: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Score, x and y in the block of packed peaks, as floats."""
    level = (peaks / PLACES).floor()
    place = peaks - level * PLACES
    y = ((place + 0.5) / side).floor()
    return level / LEVELS, place - y * side, y


def suppress(peaks: Tensor, radius: int, rounds: int = 2) -> Tensor:
    """Non-maximum suppression among the blocks' peaks (B, h, w): all but the kept ones set to 0.

    Greedy suppression keeps the strongest, discards what lies within `radius` rows and columns of
    it, and goes on with what is left. Each round here keeps all peaks that have no stronger one
    near them, as greedy would, and discards their neighbours; `rounds` bounds how long a chain of
    ever weaker neighbours is followed. What differs from greedy suppression of all pixels: a block
    whose peak is discarded gives no second one. Of the 1024 strongest keypoints of a 640x480 image
    86 to 88 % are the same with radius 2 to 4, the others nearly as strong.
    """
    side = block_side(radius)
    reach = (radius + side - 1) // side  # how many blocks away a near pixel may be
    steps = range(-reach, reach + 1)
    offsets = [(dy, dx) for dy in steps for dx in steps if (dy, dx) != (0, 0)]
    size = peaks.shape[1:]

    def around(grid: Tensor) -> Iterator[Tensor]:
        padded = F.pad(grid, (reach, reach, reach, reach))
        for dy, dx in offsets:
            yield padded.narrow(1, reach + dy, size[0]).narrow(2, reach + dx, size[1])

    def any_of(grid: Tensor, where: list[Tensor]) -> Tensor:
        found = [chosen & (other > 0) for chosen, other in zip(where, around(grid), strict=True)]
        return functools.reduce(operator.or_, found)

    _, x, y = unpack(peaks, side)
    near, stronger = [], []
    others = zip(offsets, around(peaks), around(x), around(y), strict=True)
    for (dy, dx), other, other_x, other_y in others:
        apart_x, apart_y = (side * dx + other_x - x).abs(), (side * dy + other_y - y).abs()
        near.append((apart_x <= radius) & (apart_y <= radius))
        # Of two equals one must be the stronger: here the first in reading order of the blocks.
        stronger.append(near[-1] & (other >= peaks if (dy, dx) < (0, 0) else other > peaks))
    left = (peaks >= PLACES).to(peaks.dtype)  # a score of at least one step
    kept = left
    for i in range(rounds):
        if i:
            left = torch.where(any_of(kept, near), 0.0, left)
        kept = torch.where(any_of(left, stronger), 0.0, left)
    return peaks * kept


def top_keypoints(peaks: Tensor, side: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` strongest peaks of each image.

    Args:
        peaks: (B, h, w) from `block_peaks`, 0 where there is none.

    Returns:
        Scores (B, count) in falling order, 0 where there are fewer keypoints, and pixel positions
        (B, count, 2) int64, x and y.
    """
    strongest, block = peaks.flatten(1).topk(count, dim=1)
    scores, x, y = unpack(strongest, side)
    row = block // peaks.shape[2]
    column = block - row * peaks.shape[2]
    return scores, torch.stack([column * side + x.long(), row * side + y.long()], -1)


def centroid(heat: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid (B, K, 2) of the 5x5 heatmap window around each pixel, from that pixel, and the
    window's heat (B, K)."""
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
    total = window.sum(-1)
    return window @ offsets / total.clamp(min=1e-9)[..., None], total


def refine(heat: Tensor, pixels: Tensor) -> Tensor:
    """Sub-pixel positions (B, K, 2): the centroid of the 5x5 heatmap window around each pixel."""
    return pixels.to(heat.dtype) + centroid(heat, pixels)[0]


def detect(
    logits: Tensor, size: tuple[int, int], count: int, radius: int, border: int
) -> tuple[Tensor, Tensor]:
    """Keypoints of each image of a batch, strongest first.

    Args:
        logits: (B, 1, H, W), the network's.
        size: height and width of the image proper; what lies beyond is padding.
        count: K, the fixed number of rows in the results.
        radius: of non-maximum suppression, pixels, at least 2.
        border: width of the frame in which no keypoint is reported, pixels.

    Returns:
        Positions (B, K, 2) and scores (B, K). A score is the heat of the 3x3 pixels around the
        keypoint, at most 1. Rows without a keypoint come last and have score 0.
    """
    height, width = size
    heat = heatmap(logits)
    inner = torch.zeros_like(heat)
    inner[:, border : height - border, border : width - border].fill_(1.0)
    side = block_side(radius)
    peaks = suppress(block_peaks(mean_heat(heat) * inner, side), radius)
    mean, pixels = top_keypoints(peaks, side, count)
    scores = (9 * mean).clamp(max=1.0)
    x, y = refine(heat, pixels).unbind(-1)  # with a narrow border the window may reach beyond
    xy = torch.stack([x.clamp(0, width - 1), y.clamp(0, height - 1)], -1)
    return xy, scores
