"""Rectifies points inside the pipeline. Fixed shapes, no host synchronisation.

Images are not warped: only points are rectified, with a table from `RawStereoCalibration`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kp_frontend.calibration import MAP_MARGIN, MAP_STEP, NOWHERE
from kp_frontend.sampling import sampling_grid

SPAN = 2.0  # half width of the central difference, pixels; less than the margin of the map


def rectify(xy: Tensor, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rectify raw keypoints, and return the local Jacobian of the inverse mapping.

    Args:
        xy: (B, K, 2) raw pixels.
        maps: (B, 2, h, w) as in `RawStereoCalibration.maps`.

    Returns:
        Rectified pixels (B, K, 2). Jacobian (B, K, 2, 2): the first column is the displacement in
        the raw image for one pixel to the right in the rectified image, the second for one pixel
        down. Whether the point lies in the rectified image plane, (B, K) bool.
    """
    x, y = xy.unbind(-1)
    cross = torch.stack(
        [
            xy,
            torch.stack([x - SPAN, y], -1),
            torch.stack([x + SPAN, y], -1),
            torch.stack([x, y - SPAN], -1),
            torch.stack([x, y + SPAN], -1),
        ],
        1,
    )
    grid = sampling_grid((cross + MAP_MARGIN) / MAP_STEP, *maps.shape[2:])
    found = F.grid_sample(maps, grid, "bilinear", "border", align_corners=False)
    places, left, right, above, below = found.permute(0, 2, 3, 1).unbind(1)
    # Invert the Jacobian of raw -> rectified.
    a, c = ((right - left) / (2 * SPAN)).unbind(-1)
    b, d = ((below - above) / (2 * SPAN)).unbind(-1)
    inside = found.abs().amax((1, 2)) < NOWHERE / 1e3
    scale = 1 / torch.where(inside, a * d - b * c, 1.0)
    rows = [torch.stack([d, -b], -1), torch.stack([-c, a], -1)]
    return places, torch.stack(rows, -2) * scale[..., None, None], inside
