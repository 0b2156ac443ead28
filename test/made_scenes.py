"""Made stereo pairs, and scenes in Middlebury's layouts."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np


def textured(shift: int) -> tuple[np.ndarray, np.ndarray]:
    """A pair of blurred noise, the right one shifted."""
    noise = np.random.default_rng(1).integers(0, 256, (160, 260), np.uint8)
    wide = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)
    return np.ascontiguousarray(wide[:, :220]), np.ascontiguousarray(wide[:, shift : shift + 220])


def write_pfm(path: Path, values: np.ndarray) -> None:
    header = f"Pf\n{values.shape[1]} {values.shape[0]}\n-0.0039\n".encode()
    path.write_bytes(header + values[::-1].astype("<f4").tobytes())


def write_scene(place: Path, left: str, right: str, maps: list[str], height: int) -> None:
    """A scene of gradients in a layout. PFM maps have disparity 7, the others store 24."""
    (place / left).parent.mkdir(parents=True, exist_ok=True)
    image = np.tile(np.arange(64, dtype=np.uint8), (height, 1))
    for name in (left, right):
        colour = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) if name.endswith(".ppm") else image
        assert cv2.imwrite(str(place / name), colour)
    for name in maps:
        if name.endswith(".pfm"):
            write_pfm(place / name, np.full(image.shape, 7.0))
        else:
            cv2.imwrite(str(place / name), np.full(image.shape, 24, np.uint8))
