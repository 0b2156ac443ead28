"""Registration of small windows of an image in another one. Fixed shapes, no host synchronisation.

Pixel coordinates throughout: (0, 0) is the centre of the top-left pixel, x to the right, y down.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kp_frontend.matching import PATCH_RADIUS, windows

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


def stored_windows(image: Tensor, xy: Tensor, steps: Tensor | None = None) -> Tensor:
    """Windows (K, PATCH_SIDE, PATCH_SIDE) of an image (H, W) around pixels (K, 2), to be found
    again by `register`. `steps` as in `windows`."""
    return windows(image, xy, PATCH_RADIUS + 1, steps, rows=PATCH_RADIUS + 1)


class Template(NamedTuple):
    """Windows to be found in another image, K rows, 81 pixels each.

    `values` (K, 81) of zero mean and unit variance; `level` and `contrast` (K, 1), the mean and
    the standard deviation that they had, the latter at least 1; `along` and `across` (K, 81), the
    slopes of `values` along and across the rows.
    """

    values: Tensor
    level: Tensor
    contrast: Tensor
    along: Tensor
    across: Tensor


def template_of(wide: Tensor, weight: Tensor | float = 1.0) -> Template:
    """The template of windows (K, PATCH_SIDE, PATCH_SIDE), which lose their margin.

    Args:
        weight: (81,) of the pixels, with mean 1, or 1 for all alike.
    """
    inner = wide[:, 1:-1, 1:-1].flatten(1)
    level = (weight * inner).mean(1, keepdim=True)
    centred = inner - level
    contrast = (weight * centred.square()).mean(1, keepdim=True).sqrt().clamp(min=1.0)
    along = (wide[:, 1:-1, 2:] - wide[:, 1:-1, :-2]).flatten(1) / (2 * contrast)
    across = (wide[:, 2:, 1:-1] - wide[:, :-2, 1:-1]).flatten(1) / (2 * contrast)
    return Template(centred / contrast, level, contrast, along, across)


def moments(window: Tensor, weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance, and standard deviation (at least 1) of windows (K, 81), (K,) each.

    With them, sums over the normalised window follow from sums over the grey levels. Grey levels
    should be near 0, for the sake of precision.
    """
    mean = (weight * window).mean(1)
    variance = (weight * window.square()).mean(1) - mean.square()
    return mean, variance, variance.clamp(min=1.0).sqrt()


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
    template = template_of(stored)
    reach = torch.arange(-PATCH_RADIUS, PATCH_RADIUS + 1, device=image.device, dtype=image.dtype)
    x, y = (axis.flatten() for axis in torch.meshgrid(reach, reach, indexing="xy"))
    slopes = template.along, template.across, template.along * x + template.across * y
    normal = [[(one * other).sum(1) for other in slopes[: i + 1]] for i, one in enumerate(slopes)]
    inverse = _inverse(normal)
    own = [((slope * template.values).sum(1), slope.sum(1)) for slope in slopes]

    def look(xy: Tensor, scale: Tensor) -> Tensor:
        return windows(image, xy, PATCH_RADIUS, scale).flatten(1) - template.level

    for _ in range(STEPS):
        window = look(xy, scale)
        mean, _, spread = moments(window)
        # Sums over slope times residual, the normalised window minus the template.
        a, b, c = (
            ((slope * window).sum(1) - mean * total) / spread - of_template
            for slope, (of_template, total) in zip(slopes, own, strict=True)
        )
        x, y, growth = (row[0] * a + row[1] * b + row[2] * c for row in inverse)
        xy = xy - scale[:, None] * torch.stack([x, y], -1)
        scale = scale * (1 - growth.clamp(-LARGEST_GROWTH, LARGEST_GROWTH))
    window = look(xy, scale)
    _, variance, spread = moments(window)
    correlation = (window * template.values).mean(1) / spread
    power = template.values.square().mean(1)
    residual_power = power - 2 * correlation + variance / spread.square()
    # One grey level of sensor noise at least, as in the refinement of disparity.
    noise = residual_power.clamp(min=0) + template.contrast[:, 0] ** -2
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
