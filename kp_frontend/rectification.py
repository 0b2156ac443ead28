"""Raw pixels to rectified ones inside the pipeline. Fixed shapes, no host synchronisation.

The images stay as they are: only points move, through a table that `RawStereoCalibration` makes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kp_frontend.calibration import MAP_MARGIN, MAP_STEP, NOWHERE
from kp_frontend.sampling import sampling_grid

SPAN = 2.0  # half the way over which the map's slope is taken, pixels; less than the map's margin


def rectify(xy: Tensor, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rectified places of raw keypoints, and how the raw image moves there.

    Args:
        xy: (B, K, 2) raw pixels.
        maps: (B, 2, h, w) as `RawStereoCalibration.maps`.

    Returns:
        Rectified pixels (B, K, 2); steps (B, K, 2, 2), whose first column is the way in the raw
        image of one pixel to the right in the rectified one, the second of one pixel down; and
        whether the place is one that the rectified image plane has, (B, K) bool.
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
    # The slope of raw -> rectified, turned round.
    a, c = ((right - left) / (2 * SPAN)).unbind(-1)
    b, d = ((below - above) / (2 * SPAN)).unbind(-1)
    inside = found.abs().amax((1, 2)) < NOWHERE / 1e3
    scale = 1 / torch.where(inside, a * d - b * c, 1.0)
    rows = [torch.stack([d, -b], -1), torch.stack([-c, a], -1)]
    return places, torch.stack(rows, -2) * scale[..., None, None], inside
