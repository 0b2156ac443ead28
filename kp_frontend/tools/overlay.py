"""Draws matches on an image, coloured by depth."""

from __future__ import annotations

import cv2
import numpy as np


def draw_matches(grey: np.ndarray, xy: np.ndarray, near: np.ndarray, scale: int = 1) -> np.ndarray:
    """Draw a dot for each match, red for near and blue for far.

    Args:
        grey: (H, W) uint8.
        xy: (M, 2) pixels.
        near: (M,) closeness, 0 (far) to 1 (near); NaN draws no dot.
        scale: factor by which the image is enlarged.

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
    for place, colour in zip(places.tolist(), colours.tolist(), strict=True):
        cv2.circle(canvas, place, 2 * scale, colour, -1, cv2.LINE_AA)
    return canvas
