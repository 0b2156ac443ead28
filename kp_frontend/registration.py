"""Registration of small windows of an image in another one. Fixed shapes, no host synchronisation.

Pixel coordinates throughout: (0, 0) is the centre of the top-left pixel, x to the right, y down.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kp_frontend.matching import PATCH_RADIUS, normalised, windows

PATCH_SIDE = 2 * PATCH_RADIUS + 3  # of a stored window: one pixel more on each side for its slopes
STEPS = 2  # Gauss-Newton steps
DAMPING = 1e-3  # of the normal equations, as a share of their mean diagonal
LARGEST_GROWTH = 0.2  # by which one step may change the scale


class Registered(NamedTuple):
    """Where windows were found, K rows.

    `xy` (K, 2) pixels, `scale` (K,) how large the window is there, `correlation` (K,) -1..1,
    `sigma` (K,) standard deviation of the position along its least certain axis, pixels.
    """

    xy: Tensor
    scale: Tensor
    correlation: Tensor
    sigma: Tensor


def stored_windows(image: Tensor, xy: Tensor) -> Tensor:
    """Windows (K, PATCH_SIDE, PATCH_SIDE) of an image (H, W) around pixels (K, 2), to be found
    again by `register`."""
    return windows(image, xy, PATCH_RADIUS + 1, rows=PATCH_RADIUS + 1)


def register(image: Tensor, stored: Tensor, xy: Tensor, scale: Tensor) -> Registered:
    """Find stored windows in another image.

    Image registration by Gauss-Newton steps (Lucas and Kanade, 1981) in the inverse compositional
    form (Baker and Matthews, 2004), over two shifts and the scale. Windows are made zero mean and
    unit variance, so that exposure does not matter. It converges from about 2 pixels away.

    Args:
        image: (H, W) float.
        stored: (K, PATCH_SIDE, PATCH_SIDE) from `stored_windows`.
        xy: (K, 2) first guess, pixels.
        scale: (K,) first guess of how large the windows are in the image.
    """
    template, spread = normalised(stored[:, 1:-1, 1:-1])
    right = (stored[:, 1:-1, 2:] - stored[:, 1:-1, :-2]) / (2 * spread)
    down = (stored[:, 2:, 1:-1] - stored[:, :-2, 1:-1]) / (2 * spread)
    reach = torch.arange(-PATCH_RADIUS, PATCH_RADIUS + 1, device=image.device, dtype=image.dtype)
    grow = right * reach + down * reach[:, None]
    slopes = right, down, grow
    normal = [
        [(one * other).sum((1, 2)) for other in slopes[: i + 1]] for i, one in enumerate(slopes)
    ]
    inverse = _inverse(normal)
    axes = torch.eye(2, device=image.device, dtype=image.dtype)

    def look(xy: Tensor, scale: Tensor) -> Tensor:
        return normalised(windows(image, xy, PATCH_RADIUS, scale[:, None, None] * axes))[0]

    for _ in range(STEPS):
        residual = look(xy, scale) - template
        a, b, c = ((slope * residual).sum((1, 2)) for slope in slopes)
        x, y, growth = (row[0] * a + row[1] * b + row[2] * c for row in inverse)
        xy = xy - scale[:, None] * torch.stack([x, y], -1)
        scale = scale * (1 - growth.clamp(-LARGEST_GROWTH, LARGEST_GROWTH))
    seen = look(xy, scale)
    correlation = (seen * template).mean((1, 2))
    # One grey level of sensor noise at least, as in the refinement of disparity.
    noise = (seen - template).square().mean((1, 2)) + spread.flatten() ** -2
    a, b, c = normal[0][0], normal[1][0], normal[1][1]
    least = (a + c) / 2 - (((a - c) / 2).square() + b.square()).sqrt()
    return Registered(xy, scale, correlation, (noise / least.clamp(min=1e-6)).sqrt())


def _inverse(normal: list[list[Tensor]]) -> list[list[Tensor]]:
    """Inverse of symmetric 3x3 matrices, damped, by cofactors: engines have no solver.

    Each element is (K,); only the lower triangle is used. No matrix product here nor above: an
    engine may run those, and all that leads to them, in half precision.
    """
    (a,), (b, d), (c, e, f) = normal
    damping = DAMPING * (a + d + f) / 3 + 1e-4
    a, d, f = a + damping, d + damping, f + damping
    first, second, third = d * f - e * e, c * e - b * f, b * e - c * d
    scale = 1 / (a * first + b * second + c * third).clamp(min=1e-12)
    rows = [
        [first, second, third],
        [second, a * f - c * c, b * c - a * e],
        [third, b * c - a * e, a * d - b * b],
    ]
    return [[scale * element for element in row] for row in rows]
