"""Draws matches on an image, coloured by depth and confidence."""

from __future__ import annotations

import math

import cv2
import numpy as np


def draw_matches(
    grey: np.ndarray,
    xy: np.ndarray,
    near: np.ndarray,
    scale: int = 1,
    confidence: np.ndarray | None = None,
) -> np.ndarray:
    """Draw a dot for each match, red for near and blue for far.

    With confidence each dot has a ring, from red (0.5 and less) over yellow to green (1).

    Args:
        grey: (H, W) uint8.
        xy: (M, 2) pixels.
        near: (M,) closeness, 0 (far) to 1 (near); NaN draws no dot.
        scale: factor by which the image is enlarged.
        confidence: (M,) 0..1; NaN draws no ring.

    Returns:
        (scale * H, scale * W, 3) uint8, BGR.
    """
    canvas = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    if scale != 1:
        canvas = cv2.resize(canvas, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    known = np.isfinite(near)
    levels = (255 * near[known]).clip(0, 255).astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_TURBO).reshape(-1, 3)
    places = np.rint(xy[known] * scale + (scale - 1) / 2).astype(int)
    trust = np.full(len(xy), np.nan) if confidence is None else 2 * confidence - 1
    for place, colour, level in zip(
        places.tolist(), colours.tolist(), trust[known].tolist(), strict=True
    ):
        if math.isfinite(level):
            level = min(max(level, 0.0), 1.0)
            ring = (0, round(255 * min(1.0, 2 * level)), round(255 * min(1.0, 2 - 2 * level)))
            cv2.circle(canvas, place, 4 * scale, ring, 1, cv2.LINE_AA)
        cv2.circle(canvas, place, 2 * scale, colour, -1, cv2.LINE_AA)
    return canvas
