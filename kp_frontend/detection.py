"""Keypoints from the network's logits. Fixed shapes, no host synchronisation.

No constants are copied from the host either (no `new_tensor`): a CUDA graph cannot capture that.

Pixel coordinates throughout: (0, 0) is the centre of the top-left pixel, x to the right, y down.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# A score and a position in a block, packed into one number of 24 bits, which float32 represents
# exactly. Powers of two make unpacking exact in engines that divide by multiplying with the
# reciprocal.
LEVELS = 2**19
PLACES = 2**4
REFINE_RADIUS = 2  # of the window for the sub-pixel centroid, pixels
SPREAD = 1.0  # standard deviation of the weights of a score, pixels
SCALE = 1.38  # of a score, so that it is about the heat of the 3x3 pixels around a keypoint


def heatmap(logits: Tensor) -> Tensor:
    """Keypoint probability of each pixel, (B, H, W), from the network's logits (B, 1, H, W)."""
    return logits[:, 0].float().sigmoid()


def mean_heat(heat: Tensor) -> Tensor:
    """Mean heat of the 3x3 pixels around each pixel, (B, H, W) in 0..1; 0 beyond the image.

    Keypoints are ranked by this value. A keypoint between pixels is spread over up to four of them,
    so the height of its peak depends on the pixel grid and differs between views.
    """
    padded = F.pad(heat, (1, 1, 1, 1))
    rows = padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def block_side(radius: int) -> int:
    """Side of the blocks that provide one candidate keypoint each.

    A block never holds two keypoints. It is at most 4 pixels wide, so that a score and a position
    in the block fit into one float32.
    """
    return min(radius + 1, 4)


def block_peaks(heat: Tensor, side: int) -> Tensor:
    """The strongest pixel of each block, (B, h, w), with score and position in one number.

    A peak is `floor(score * LEVELS) * PLACES + place`, where place is side * y + x in the block, so
    one maximum finds both. Scores are rounded down by at most 2e-6.

    Args:
        heat: (B, H, W) in 0..1.
    """
    beyond = (0, -heat.shape[2] % side, 0, -heat.shape[1] % side)
    blocks = F.pixel_unshuffle(F.pad(heat[:, None], beyond), side)
    place = torch.arange(side * side, device=heat.device, dtype=heat.dtype)[:, None, None]
    return ((blocks * LEVELS).floor() * PLACES + place).amax(1)


def unpack(peaks: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Score, and x and y in the block, of packed peaks, as floats."""
    level = (peaks / PLACES).floor()
    place = peaks - level * PLACES
    y = ((place + 0.5) / side).floor()
    return level / LEVELS, place - y * side, y


def suppress(peaks: Tensor, radius: int, rounds: int = 2) -> Tensor:
    """Non-maximum suppression among the peaks of blocks (B, h, w); discarded peaks become 0.

    Greedy suppression keeps the strongest peak, discards all others within `radius` rows and
    columns, and repeats this with the rest. Each round here keeps, like greedy suppression, all
    peaks without a stronger one near them, and discards their neighbours. `rounds` limits the
    length of a chain of ever weaker neighbours. Unlike with greedy suppression of all pixels, a
    block with a discarded peak provides no second one. Of the 1024 strongest keypoints of a 640x480
    image, 86 to 88 % are the same with radius 2 to 4, and the others are nearly as strong.
    """
    side = block_side(radius)
    reach = (radius + side - 1) // side  # distance of the farthest block with a near pixel
    steps = range(-reach, reach + 1)
    offsets = [(dy, dx) for dy in steps for dx in steps if (dy, dx) != (0, 0)]
    height, width = peaks.shape[1:]
    _, x, y = unpack(peaks, side)

    def strongest_near(grid: Tensor) -> Tensor:
        """The strongest near peak of a grid, and 1 more if it comes before in reading order."""
        padded = F.pad(grid, (reach, reach, reach, reach))
        found = torch.zeros_like(grid)
        for dy, dx in offsets:
            other = padded.narrow(1, reach + dy, height).narrow(2, reach + dx, width)
            _, other_x, other_y = unpack(other, side)
            apart = torch.maximum((side * dx + other_x - x).abs(), (side * dy + other_y - y).abs())
            # Peaks are whole numbers: of two equal ones, the first in reading order wins.
            first = 1.0 if (dy, dx) < (0, 0) else 0.0
            found = torch.maximum(found, torch.where(apart <= radius, other + first, 0.0))
        return found

    left = torch.where(peaks >= PLACES, peaks, 0.0)  # a score of at least one level
    kept = left
    for i in range(rounds):
        if i:
            left = torch.where(strongest_near(kept) >= PLACES, 0.0, left)
        kept = torch.where(strongest_near(left) > left, 0.0, left)
    return kept


def top_keypoints(peaks: Tensor, side: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` strongest peaks of each image.

    Args:
        peaks: (B, h, w) from `block_peaks`, 0 where there is none.

    Returns:
        Scores (B, count) in descending order, 0 where there are fewer keypoints, and pixel
        positions (B, count, 2) int64, x and y.
    """
    strongest, block = peaks.flatten(1).topk(count, dim=1)
    scores, x, y = unpack(strongest, side)
    row = block // peaks.shape[2]
    column = block - row * peaks.shape[2]
    return scores, torch.stack([column * side + x.long(), row * side + y.long()], -1)


def centroid(heat: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid of the 5x5 heatmap window around each pixel.

    Returns:
        Offset of the centroid from the pixel (B, K, 2), and the heat in the window (B, K).
    """
    window, offsets = heat_windows(heat, pixels)
    return _weighted_mean(window, offsets), window.sum(-1)


def heat_windows(heat: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The 5x5 heatmap window around each pixel, (B, K, 25), and its offsets from it, (25, 2)."""
    width = heat.shape[2]
    r = REFINE_RADIUS
    padded = F.pad(heat, (r, r, r, r))
    side, stride = 2 * r + 1, width + 2 * r
    steps = torch.arange(side, device=heat.device)  # from the top left corner of the window
    dy, dx = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    corner = pixels[..., 1] * stride + pixels[..., 0]
    place = corner[..., None] + dy * stride + dx
    window = padded.flatten(1).gather(1, place.flatten(1)).reshape(place.shape)
    return window, torch.stack([dx, dy], -1).to(heat.dtype) - r


def _weighted_mean(window: Tensor, offsets: Tensor) -> Tensor:
    """Mean of offsets (25, 2) with the weights of windows (B, K, 25), (B, K, 2)."""
    # No matrix product: an engine may use half precision for that.
    sums = [(window * way).sum(-1) for way in offsets.unbind(-1)]
    return torch.stack(sums, -1) / window.sum(-1).clamp(min=1e-9)[..., None]


def located(heat: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Sub-pixel position (B, K, 2) and score (B, K) of the keypoint at each pixel.

    The score is the heat around the position, weighted with a Gaussian. Unlike the heat of whole
    pixels it hardly depends on the pixel grid, so the strongest keypoints of two views are the
    same ones.
    """
    window, offsets = heat_windows(heat, pixels)
    centre = _weighted_mean(window, offsets)
    apart = (offsets[:, 0] - centre[..., :1]).square() + (offsets[:, 1] - centre[..., 1:]).square()
    score = SCALE * (window * torch.exp(apart * (-0.5 / SPREAD**2))).sum(-1)
    return pixels.to(heat.dtype) + centre, score


def refine(heat: Tensor, pixels: Tensor) -> Tensor:
    """Sub-pixel positions (B, K, 2): the centroid of the 5x5 heatmap window around each pixel."""
    return pixels.to(heat.dtype) + centroid(heat, pixels)[0]


def detect(
    logits: Tensor, size: tuple[int, int], count: int, radius: int, border: int
) -> tuple[Tensor, Tensor]:
    """Keypoints from the network's logits (B, 1, H, W), see `keypoints`."""
    return keypoints(heatmap(logits), size, count, radius, border)


def keypoints(
    heat: Tensor, size: tuple[int, int], count: int, radius: int, border: int
) -> tuple[Tensor, Tensor]:
    """Keypoints of each image of a batch, strongest first.

    Args:
        heat: (B, H, W) probabilities, from `heatmap`.
        size: height and width of the image; pixels beyond are padding.
        count: K, the fixed number of rows of the results.
        radius: of non-maximum suppression, pixels, at least 2.
        border: width of the border without keypoints, pixels.

    Returns:
        Positions (B, K, 2) and scores (B, K), see `located`; scores are at most 1. Rows without a
        keypoint come last and have score 0.
    """
    height, width = size
    inner = torch.zeros_like(heat)
    inner[:, border : height - border, border : width - border].fill_(1.0)
    side = block_side(radius)
    peaks = suppress(block_peaks(mean_heat(heat) * inner, side), radius)
    mean, pixels = top_keypoints(peaks, side, count)
    xy, scores = located(heat, pixels)
    # With a narrow border, the window can reach beyond the image.
    x, y = xy.unbind(-1)
    xy = torch.stack([x.clamp(0, width - 1), y.clamp(0, height - 1)], -1)
    scores, order = torch.where(mean > 0, scores, 0.0).topk(count)
    return xy.gather(1, order[..., None].expand(-1, -1, 2)), scores.clamp(max=1.0)
