"""Sub-pixel disparity of stereo matches. Fixed shapes, no host synchronisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kp_frontend.matching import PATCH_RADIUS, quarter_correlation, windows
from kp_frontend.registration import Template, moments, stored_windows, template_of

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
    steps: tuple[Tensor | None, Tensor | None] = (None, None),
    coarse: Tensor | None = None,
    wide: Tensor | None = None,
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
        wide: (K, 11, 11) the left windows with a pixel more on each side, if they are known.
    """
    weight = _weight(left).flatten()
    if wide is None:
        wide = stored_windows(left, left_xy, steps[0])
    template = template_of(wide, weight)
    along, across = _normalised_slopes(template, weight)
    # All that a step needs of the right window are weighted sums of its grey levels.
    pull_x, pull_y, like = weight * along, weight * across, weight * template.values
    a, b, d = (pull_x * along).sum(1), (pull_x * across).sum(1), (pull_y * across).sum(1)
    power = (like * template.values).mean(1)
    # One grey level of sensor noise at least, so that flat windows do not count as exact.
    sensor = template.contrast[:, 0] ** -2
    shift = torch.zeros_like(left_xy)
    for _ in range(STEPS):
        moved = shift if steps[1] is None else (steps[1] @ shift[..., None])[..., 0]
        window = windows(right, right_xy + moved, PATCH_RADIUS, steps[1]).flatten(1)
        window = window - template.level
        mean, variance, spread = moments(window, weight)
        off_x, off_y = (pull_x * window).sum(1) / spread, (pull_y * window).sum(1) / spread
        likeness = (like * window).mean(1) / spread
        residual_power = power - 2 * likeness + variance / spread.square()
        noise = residual_power.clamp(min=0) + sensor
        prior = noise / ROW_PRIOR**2
        determinant = (a * (d + prior) - b * b).clamp(min=FLAT)
        down = off_y + prior * shift[:, 1]
        step_x = ((d + prior) * off_x - b * down) / determinant
        step_y = (a * down - b * off_x) / determinant
        shift = shift - torch.stack([step_x, step_y], -1)
    good = (shift.abs().amax(1) <= LIMIT) & (noise < 1.0)
    if coarse is None:
        coarse = left_xy[:, 0] - right_xy[:, 0]
    seen = (window - mean[:, None]) / spread[:, None]
    # Influence of each pixel on the shift along the row.
    pull = (d + prior)[:, None] * pull_x - b[:, None] * pull_y
    pull = (seen - template.values) * pull / determinant[:, None]
    correlation = quarter_correlation(template.values, seen, sensor)
    return Refined(
        torch.where(good, coarse - shift[:, 0], coarse),
        good,
        shift,
        torch.where(good, correlation, -1.0),
        likeness,
        (noise * (d + prior) / determinant).sqrt(),
        (pull @ _blocks(pull)).square().sum(1).sqrt(),
        template.contrast[:, 0],
    )


def _normalised_slopes(template: Template, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes of a template along and across the rows, (K, 81), without what normalisation takes
    out of the window, which moves nothing."""

    def weighted(values: Tensor) -> Tensor:
        return (weight * values).mean(1, keepdim=True)

    power = weighted(template.values.square()).clamp(min=FLAT)
    along, across = (
        slope - weighted(slope) - template.values * (weighted(template.values * slope) / power)
        for slope in (template.along, template.across)
    )
    return along, across


def _blocks(like: Tensor) -> Tensor:
    """Weights (81, 9) of the pixels of a window, for the sums of its blocks."""
    line = torch.arange(2 * PATCH_RADIUS + 1, device=like.device) // BLOCK
    side = (2 * PATCH_RADIUS + 1) // BLOCK
    block = (line[:, None] * side + line).flatten()
    return (block[:, None] == torch.arange(side * side, device=like.device)).to(like.dtype)


def _weight(image: Tensor) -> Tensor:
    """Weight of the pixels of a window, with mean 1."""
    place = torch.arange(-PATCH_RADIUS, PATCH_RADIUS + 1, device=image.device, dtype=image.dtype)
    bell = (place.square() / (-2 * WINDOW_SIGMA**2)).exp()
    weight = bell[:, None] * bell
    return weight / weight.mean()
