"""The rectified stereo camera: what turns a disparity into depth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class StereoCalibration:
    """A rectified pair of cameras, in the terms of ROS's camera_info projection matrices.

    Frame: left rectified optical frame, x right, y down, z forward, metres. Lengths fx, fy and
    principal point cx, cy in pixels; baseline in metres, positive. `offset` is the difference of
    the principal points' columns, cx_left - cx_right, pixels: a point at infinity has disparity
    `offset`, which is 0 for most rigs.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    baseline: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        values = (self.fx, self.fy, self.cx, self.cy, self.baseline, self.offset)
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"calibration is not finite: {self}")
        if min(self.fx, self.fy, self.baseline) <= 0:
            raise ValueError(f"focal lengths and baseline must be positive: {self}")

    @classmethod
    def from_projections(cls, left: npt.ArrayLike, right: npt.ArrayLike) -> StereoCalibration:
        """From the 3x4 projection matrices (or their 12 numbers) of both rectified cameras.

        As ROS defines them: right[0, 3] = -fx * baseline.

        Raises:
            ValueError: not 12 finite numbers each, or no positive focal length and baseline (all
                zeros is what an uncalibrated camera sends).
        """
        p_left = np.asarray(left, np.float64).reshape(-1)
        p_right = np.asarray(right, np.float64).reshape(-1)
        if p_left.size != 12 or p_right.size != 12:
            raise ValueError("a projection matrix has 12 numbers")
        fx = float(p_left[0])
        if fx <= 0 or p_right[0] <= 0:
            raise ValueError(
                "the projection matrix has no focal length: the camera is not calibrated"
            )
        return cls(
            fx=fx,
            fy=float(p_left[5]),
            cx=float(p_left[2]),
            cy=float(p_left[6]),
            baseline=float(p_left[3] / fx - p_right[3] / p_right[0]),
            offset=float(p_left[2] - p_right[2]),
        )

    def disparity(self, depth: float) -> float:
        """Disparity in pixels of a point at a depth in metres (0 < depth <= inf)."""
        return self.fx * self.baseline / depth + self.offset

    def points(self, xy: np.ndarray, disparity: np.ndarray) -> np.ndarray:
        """Triangulate.

        Args:
            xy: (M, 2) rectified left pixels.
            disparity: (M,) pixels.

        Returns:
            (M, 3) float32, metres; NaN where the disparity is not beyond that of infinity.
        """
        parallax = np.asarray(disparity, np.float64) - self.offset
        with np.errstate(divide="ignore"):
            z = np.where(parallax > 0, self.fx * self.baseline / parallax, np.nan)
        z[~np.isfinite(z)] = np.nan
        x = (xy[:, 0] - self.cx) / self.fx * z
        y = (xy[:, 1] - self.cy) / self.fy * z
        return np.column_stack([x, y, z]).astype(np.float32)
