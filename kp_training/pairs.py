"""Rectified stereo pairs with disparity, as training pairs.

A folder with a `scenes.json`, as for `kp evaluate middlebury`, is a set of stereo pairs. The file
is a list of `{"dir", "left", "right", "gt", "scale"}`. `gt` is the left image's disparity map and
is optional. The images of a pair without it are used as single images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kp_training.evaluation.scenes import read_disparity


@dataclass(frozen=True)
class StereoPair:
    """The files of a pair, relative to the folder. Disparity is the stored value / `scale`."""

    scene: str
    left: str
    right: str
    disparity: str | None
    scale: float


def find_pairs(folder: Path) -> list[StereoPair]:
    """The stereo pairs in the `scenes.json` of a folder; an empty list if there is no such file.

    Raises:
        ValueError: the file cannot be read.
    """
    listing = folder / "scenes.json"
    if not listing.is_file():
        return []
    try:
        return [
            StereoPair(
                entry["dir"],
                f"{entry['dir']}/{entry['left']}",
                f"{entry['dir']}/{entry['right']}",
                # Training needs the map of the left image.
                f"{entry['dir']}/{entry['gt']}"
                if entry.get("gt") and not entry.get("refright")
                else None,
                float(entry.get("scale", 1)),
            )
            for entry in json.loads(listing.read_text())
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{listing} is not a list of scenes with dir, left, right") from error


def right_disparity(folder: Path, pair: StereoPair) -> np.ndarray:
    """Disparity at the pixels of the right image, (H, W) float32, 0 where it is unknown.

    Each left pixel is moved to its position in the right image. Where several pixels meet, the
    nearest surface (the largest disparity) wins.
    """
    left = read_disparity(folder / str(pair.disparity), pair.scale)
    row, column = np.nonzero(np.isfinite(left))
    disparity = left[row, column]
    place = np.rint(column - disparity).astype(int)
    seen = place >= 0
    right = np.zeros_like(left)
    np.maximum.at(right, (row[seen], place[seen]), disparity[seen])
    return right
