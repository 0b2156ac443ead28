"""Rectified stereo pairs with disparity, as training pairs.

A folder with a `scenes.json` as `kp evaluate middlebury` reads it is a set of stereo pairs: a list
of `{"dir", "left", "right", "gt", "scale"}`, `gt` being the left image's disparity map, or left
out. Pairs without one are trained on as single images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kp_training.evaluation.scenes import read_disparity


@dataclass(frozen=True)
class StereoPair:
    """Where a pair's files lie, relative to the folder; `scale` divides the stored disparity."""

    scene: str
    left: str
    right: str
    disparity: str | None
    scale: float


def find_pairs(folder: Path) -> list[StereoPair]:
    """The stereo pairs that a folder lists; none if it lists none.

    Raises:
        ValueError: the list cannot be read.
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
                # A map of the right image is of no use here.
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
    """Disparity at the pixels of the right image, (H, W) float32, 0 where it is not known.

    Each left pixel is moved to where it is seen; the nearest surface, of the largest disparity,
    hides what is behind it.
    """
    left = read_disparity(folder / str(pair.disparity), pair.scale)
    row, column = np.nonzero(np.isfinite(left))
    disparity = left[row, column]
    place = np.rint(column - disparity).astype(int)
    seen = place >= 0
    right = np.zeros_like(left)
    np.maximum.at(right, (row[seen], place[seen]), disparity[seen])
    return right
