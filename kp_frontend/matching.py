"""Matching of keypoints between images. Fixed shapes, no host synchronisation.

Every function works on K rows per image. `valid` marks the rows that contain a keypoint. A row
without a match has index -1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kp_frontend.sampling import sampling_grid

FAR = 1e6  # where rows without a keypoint are put, pixels
PATCH_RADIUS = 4  # of the window compared by the disparity refinement, pixels


def mutual_nearest(
    similarity: Tensor, allowed: Tensor, lowest: Tensor, margin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mutual nearest neighbours under constraints.

    Args:
        similarity: (K, L) cosine similarities.
        allowed: (K, L) bool, pairs that may match.
        lowest: () similarity that a match must reach.
        margin: () by how much a match must beat the second best candidate of its left keypoint;
            None saves a pass over the matrix.

    Returns:
        For each left row the matching right row or -1, (K,) int64, and the similarity, (K,).
    """
    scores = torch.where(allowed, similarity, -2.0)
    best, column = scores.max(1)
    back = scores.argmax(0)
    rows = torch.arange(scores.shape[0], device=scores.device)
    good = (back[column] == rows) & (best >= lowest)
    if margin is not None:
        columns = torch.arange(scores.shape[1], device=scores.device)
        others = torch.where(columns == column[:, None], -2.0, scores)
        good = good & (best - others.amax(1) >= margin)
    return torch.where(good, column, -1), best


def match_stereo(
    xy: Tensor, valid: Tensor, descriptors: Tensor, limits: Tensor, with_margin: bool = True
) -> tuple[Tensor, Tensor]:
    """Match the keypoints of a rectified pair.

    Args:
        xy: (2, K, 2) positions in the left and right image, rectified pixels.
        valid: (2, K) bool.
        descriptors: (2, K, D), unit length.
        limits: (5,) row tolerance, smallest and largest disparity (pixels), lowest similarity,
            margin to the second best.
        with_margin: whether to apply the margin; without it matching is faster.

    Returns:
        Right row of each left row or -1, (K,) int64, and the similarity, (K,).
    """
    row_tolerance, smallest, largest = limits[0], limits[1], limits[2]
    # Invalid rows go out of everyone's reach, to different places on the left and on the right.
    left_x, left_y = torch.where(valid[0, :, None], xy[0], FAR).unbind(-1)
    right_x, right_y = torch.where(valid[1, :, None], xy[1], -FAR).unbind(-1)
    rows_apart = (left_y[:, None] - right_y).abs() - row_tolerance
    middle, half = (largest + smallest) / 2, (largest - smallest) / 2
    off_range = ((left_x - middle)[:, None] - right_x).abs() - half
    allowed = torch.maximum(rows_apart, off_range) <= 0
    margin = limits[4] if with_margin else None
    return mutual_nearest(descriptors[0] @ descriptors[1].T, allowed, limits[3], margin)


def match_temporal(
    xy: Tensor,
    valid: Tensor,
    descriptors: Tensor,
    before_xy: Tensor,
    before_valid: Tensor,
    before_descriptors: Tensor,
    limits: Tensor,
) -> Tensor:
    """Match keypoints (K rows) to those of the previous image of the same camera.

    Args:
        limits: (2,) farthest motion in pixels along x and y, lowest similarity.

    Returns:
        Previous row of each row or -1, (K,) int64.
    """
    x, y = torch.where(valid[:, None], xy, FAR).unbind(-1)
    before_x, before_y = torch.where(before_valid[:, None], before_xy, -FAR).unbind(-1)
    apart = torch.maximum((x[:, None] - before_x).abs(), (y[:, None] - before_y).abs())
    allowed = apart <= limits[0]
    return mutual_nearest(descriptors @ before_descriptors.T, allowed, limits[1])[0]


def windows(
    image: Tensor,
    centre: Tensor,
    columns: int,
    steps: Tensor | None = None,
    rows: int = PATCH_RADIUS,
) -> Tensor:
    """Bilinear windows (K, 2 * rows + 1, 2 * columns + 1) of an image (H, W) around pixels (K, 2).

    `steps` (K, 2, 2) are the ways in the image from one column and one row of a window to the
    next, as columns; None for whole pixels.
    """
    y = torch.arange(-rows, rows + 1, device=image.device, dtype=image.dtype)
    x = torch.arange(-columns, columns + 1, device=image.device, dtype=image.dtype)
    offsets = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    if steps is not None:
        along, down = (steps[:, None, None, :, i] for i in range(2))
        offsets = offsets[..., :1] * along + offsets[..., 1:] * down
    grid = sampling_grid(centre[:, None, None] + offsets, *image.shape)
    found = F.grid_sample(
        image[None, None], grid.flatten(1, 2)[None], "bilinear", "border", align_corners=False
    )
    return found.reshape(-1, 2 * rows + 1, 2 * columns + 1)


def normalised(window: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Windows (K, h, w) with zero mean and unit variance, and the spread (K, 1, 1) they had.

    `weight` (h, w), with mean 1, is the weight of each pixel; None weighs all alike.
    """

    def mean(values: Tensor) -> Tensor:
        return (values if weight is None else weight * values).mean((1, 2), keepdim=True)

    centred = window - mean(window)
    spread = mean(centred.square()).sqrt().clamp(min=1.0)
    return centred / spread, spread


def quarter_correlation(left: Tensor, right: Tensor, noise: Tensor) -> Tensor:
    """Lowest normalised correlation of the four quarters of windows (K, 9, 9), (K,).

    At a depth edge the window moves as a whole with one side and the quarters on the other side
    disagree, though the whole may correlate well.

    Args:
        noise: (K, 1, 1) variance of what is not to be seen as structure, so that flat quarters
            are alike.
    """
    side = PATCH_RADIUS + 1
    quarters = (
        window.unfold(1, side, PATCH_RADIUS).unfold(2, side, PATCH_RADIUS).flatten(3).flatten(1, 2)
        for window in (left, right)
    )
    a, b = (quarter - quarter.mean(-1, keepdim=True) for quarter in quarters)
    noise = noise.flatten(1)
    together = (a * b).mean(-1) + noise
    alone = (a.square().mean(-1) + noise) * (b.square().mean(-1) + noise)
    return (together / alone.sqrt()).amin(1)
