"""Sub-pixel disparity of stereo matches. Fixed shapes, no host synchronisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kp_frontend.matching import PATCH_RADIUS, normalised, quarter_correlation, windows

STEPS = 3  # Gauss-Newton steps
LIMIT = 1.5  # farthest that a match may move, pixels
ROW_PRIOR = 0.3  # standard deviation of the keypoints' row difference, pixels
WINDOW_SIGMA = 2.5  # of the Gaussian weight of a window's pixels, pixels
BLOCK = 3  # side of the blocks within which residuals are taken as correlated, pixels
FLAT = 1e-6  # least gradient energy, so that flat windows do not divide by zero

# Standard deviation of the disparity from the spread of the window alone, for methods without a
# calibration of their own: floor and scale, fitted as `kp uncertainty` fits.
PLAIN_FLOOR, PLAIN_SCALE = 0.1, 3.0


class Refined(NamedTuple):
    """Refined matches, K rows.

    `good` (K,) bool, whether the refinement converged; without it `disparity` is the keypoints'
    own and `correlation` is -1. `shift` (K, 2), by how much the right keypoint moved in the
    rectified image, pixels. `correlation` (K,) the lowest of the four quarters of the windows, by
    `quarter_correlation`, `likeness` (K,) that of the whole windows. Two estimates of the standard
    deviation of the disparity, pixels: `bound` (K,) from the noise, the Cramer-Rao bound, and
    `spread` (K,) from how much the parts of the window disagree. `contrast` (K,) is the standard
    deviation of the grey levels in the left window.
    """

    disparity: Tensor
    good: Tensor
    shift: Tensor
    correlation: Tensor
    likeness: Tensor
    bound: Tensor
    spread: Tensor
    contrast: Tensor

    def plain_sigma(self) -> Tensor:
        """Standard deviation of the disparity (K,), pixels, for methods without a calibration."""
        sigma = (PLAIN_FLOOR**2 + (PLAIN_SCALE * self.spread).square()).sqrt()
        return torch.where(self.good, sigma.clamp(max=1.0), 1.0)


def refine_disparity(
    left: Tensor,
    right: Tensor,
    left_xy: Tensor,
    right_xy: Tensor,
    steps: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    coarse: Tensor | None = None,
) -> Refined:
    """Refine matches by registration of the windows around their keypoints.

    Lucas and Kanade (1981) in the inverse compositional form of Baker and Matthews (2004). The
    window moves along the row, and, held by a prior, across it: rows differ a little in rectified
    images, and at slanted edges that would count as disparity. Windows have zero mean and unit
    variance, so that exposure does not matter, and a Gaussian weight, so that a depth edge beside
    the keypoint matters less. `Refined.spread` is the sandwich estimate of White (1980) with
    residuals that are correlated within blocks.

    Args:
        left, right: (H, W) float images.
        left_xy, right_xy: (K, 2) matched positions.
        steps: of raw images, how each moves with the rectified one there, (K, 2, 2) as `rectify`
            gives them: the windows then are what the rectified images would show.
        coarse: (K,) the keypoints' own disparity, of raw images; else that of the positions.
    """
    weight = _weight(left)
    template, contrast, along, across = _template(left, left_xy, steps[0], weight)
    a, b, d = (
        (weight * product).sum((1, 2))
        for product in (along * along, along * across, across * across)
    )
    # One grey level of sensor noise at least, so that flat windows do not count as exact.
    sensor = contrast**-2
    shift = torch.zeros_like(left_xy)
    for _ in range(STEPS):
        moved = shift if steps[1] is None else (steps[1] @ shift[..., None])[..., 0]
        window = windows(right, right_xy + moved, PATCH_RADIUS, steps[1])
        seen, _ = normalised(window, weight)
        residual = seen - template
        noise = (weight * residual.square()).mean((1, 2)) + sensor.flatten()
        prior = noise / ROW_PRIOR**2
        determinant = (a * (d + prior) - b * b).clamp(min=FLAT)
        # Influence of each pixel on the shift along the row; their sum is the step.
        pull = weight * residual * ((d + prior)[:, None, None] * along - b[:, None, None] * across)
        pull = pull / determinant[:, None, None]
        down = (weight * across * residual).sum((1, 2)) + prior * shift[:, 1]
        step_x = pull.sum((1, 2)) - b * prior * shift[:, 1] / determinant
        step_y = (a * down - b * (weight * along * residual).sum((1, 2))) / determinant
        shift = shift - torch.stack([step_x, step_y], -1)
    good = (shift.abs().amax(1) <= LIMIT) & (noise < 1.0)
    if coarse is None:
        coarse = left_xy[:, 0] - right_xy[:, 0]
    blocks = F.avg_pool2d(pull[:, None], BLOCK) * BLOCK**2
    return Refined(
        torch.where(good, coarse - shift[:, 0], coarse),
        good,
        shift,
        torch.where(good, quarter_correlation(template, seen, sensor), -1.0),
        (weight * template * seen).mean((1, 2)),
        (noise * (d + prior) / determinant).sqrt(),
        blocks.square().sum((1, 2, 3)).sqrt(),
        contrast.flatten(),
    )


def _template(
    image: Tensor, xy: Tensor, steps: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of the left image: normalised, the contrast they had, and their slopes along and
    across the row, each (K, 9, 9) but for the contrast (K, 1, 1)."""

    def weighted(values: Tensor) -> Tensor:
        return (weight * values).mean((1, 2), keepdim=True)

    wide = windows(image, xy, PATCH_RADIUS + 1, steps, rows=PATCH_RADIUS + 1)
    template, contrast = normalised(wide[:, 1:-1, 1:-1], weight)
    along = (wide[:, 1:-1, 2:] - wide[:, 1:-1, :-2]) / (2 * contrast)
    across = (wide[:, 2:, 1:-1] - wide[:, :-2, 1:-1]) / (2 * contrast)
    # What normalisation takes out of the window moves nothing.
    along, across = (
        slope - weighted(slope) - template * weighted(template * slope) for slope in (along, across)
    )
    return template, contrast, along, across


def _weight(image: Tensor) -> Tensor:
    """Weight of the pixels of a window, with mean 1."""
    place = torch.arange(-PATCH_RADIUS, PATCH_RADIUS + 1, device=image.device, dtype=image.dtype)
    bell = (place.square() / (-2 * WINDOW_SIGMA**2)).exp()
    weight = bell[:, None] * bell
    return weight / weight.mean()
