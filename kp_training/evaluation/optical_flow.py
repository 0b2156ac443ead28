"""Where pixels of one image are in another, by optical flow."""

from __future__ import annotations

import cv2
import numpy as np

WINDOW, LEVELS = (21, 21), 4
CLOSURE = 1.0  # pixels; flow there and back must come home


def follow(
    before: np.ndarray,
    now: np.ndarray,
    places: np.ndarray,
    levels: int = LEVELS,
    closure: float = CLOSURE,
) -> tuple[np.ndarray, np.ndarray]:
    """Where pixels (N, 2) of one image (H, W) are in the next, and which could be followed (N,).

    Pyramidal Lucas-Kanade (Bouguet, 2001) with a forward-backward check.

    Args:
        levels: of the image pyramid beside the image itself.
        closure: distance in pixels by which the way there and back may miss its start.
    """
    if not len(places):
        return np.zeros((0, 2), np.float32), np.zeros(0, bool)
    start = np.ascontiguousarray(places, np.float32)[:, None]
    options = {"winSize": WINDOW, "maxLevel": levels}
    there, found, _ = cv2.calcOpticalFlowPyrLK(before, now, start, None, **options)
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(now, before, there, None, **options)
    closed = np.linalg.norm((back - start)[:, 0], axis=1) <= closure
    there = there[:, 0]
    height, width = now.shape
    inside = ((there >= 0) & (there <= (width - 1, height - 1))).all(1)
    return there, closed & inside & (found[:, 0] == 1) & (found_back[:, 0] == 1)
