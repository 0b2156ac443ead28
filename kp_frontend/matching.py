"""Matching of keypoints between images. Fixed shapes, no host synchronisation.

Every function works on K rows per image. `valid` marks the rows that contain a keypoint. A row
without a match has index -1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kp_frontend.sampling import grid_scale, sampling_grid

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


def permitted(left: Tensor, right: Tensor, limits: Tensor) -> Tensor:
    """Whether rectified places (..., 2) of a pair may belong to one point, (...).

    Args:
        limits: row tolerance, smallest and largest disparity, pixels; more is ignored.
    """
    (left_x, left_y), (right_x, right_y) = left.unbind(-1), right.unbind(-1)
    row_tolerance, smallest, largest = limits[0], limits[1], limits[2]
    rows_apart = (left_y - right_y).abs() - row_tolerance
    middle, half = (largest + smallest) / 2, (largest - smallest) / 2
    off_range = (left_x - middle - right_x).abs() - half
    return torch.maximum(rows_apart, off_range) <= 0


def match_stereo(
    xy: Sequence[Tensor] | Tensor,
    valid: Sequence[Tensor] | Tensor,
    descriptors: Sequence[Tensor] | Tensor,
    limits: Tensor,
    with_margin: bool = True,
) -> tuple[Tensor, Tensor]:
    """Match the keypoints of a rectified pair.

    Args:
        xy: positions (K, 2) in the left and in the right image, rectified pixels.
        valid: of the left and the right image, (K,) bool each.
        descriptors: of both, (K, D), unit length.
        limits: (5,) row tolerance, smallest and largest disparity (pixels), lowest similarity,
            margin to the second best.
        with_margin: whether to apply the margin; without it matching is faster.

    Returns:
        Right row of each left row or -1, (K,) int64, and the similarity, (K,).
    """
    # Invalid rows go out of everyone's reach, to different places on the left and on the right.
    left = torch.where(valid[0][:, None], xy[0], FAR)
    right = torch.where(valid[1][:, None], xy[1], -FAR)
    allowed = permitted(left[:, None], right, limits)
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

    `steps` are the ways in the image from one column and one row of a window to the next, as the
    columns of matrices (K, 2, 2), or scales (K,); None for whole pixels.
    """
    y = torch.arange(-rows, rows + 1, device=image.device, dtype=image.dtype)
    x = torch.arange(-columns, columns + 1, device=image.device, dtype=image.dtype)
    # Four axes throughout: engines give three another order in memory, and copy.
    offsets = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(1, 1, -1, 2)
    scale = grid_scale(image.shape, image)
    if steps is None:
        offsets = offsets * scale
    elif steps.ndim == 1:
        offsets = offsets * scale * steps[None, :, None, None]
    else:
        along, down = (scale * steps[None, :, None, :, i] for i in range(2))
        offsets = offsets[..., :1] * along + offsets[..., 1:] * down
    grid = sampling_grid(centre, *image.shape)[None, :, None] + offsets
    found = F.grid_sample(image[None, None], grid, "bilinear", "border", align_corners=False)
    return found.reshape(-1, 2 * rows + 1, 2 * columns + 1)


def quarter_correlation(left: Tensor, right: Tensor, noise: Tensor) -> Tensor:
    """Lowest normalised correlation of the four quarters of windows (K, 81), (K,).

    At a depth edge the window moves as a whole with one side and the quarters on the other side
    disagree, though the whole may correlate well.

    Args:
        left, right: of zero mean and unit variance, or about so.
        noise: (K,) variance of what is not to be seen as structure, so that flat quarters
            are alike.
    """
    # A product with a matrix is faster than sums over parts of the windows.
    values = torch.stack([left, right, left * left, right * right, left * right])
    a, b, aa, bb, ab = (values @ _quarters(left)).unbind(0)
    noise = noise[:, None]
    together = ab - a * b + noise
    alone = (aa - a * a + noise) * (bb - b * b + noise)
    return (together / alone.sqrt()).amin(1)


def _quarters(like: Tensor) -> Tensor:
    """Weights (81, 4) of the pixels of a window, for the means of its quarters. Quarters share the
    middle lines."""
    line = torch.arange(2 * PATCH_RADIUS + 1, device=like.device)
    halves = [half.to(like.dtype) for half in (line <= PATCH_RADIUS, line >= PATCH_RADIUS)]
    quarters = [(rows[:, None] * columns).flatten() for rows in halves for columns in halves]
    return torch.stack(quarters, 1) / (PATCH_RADIUS + 1) ** 2
