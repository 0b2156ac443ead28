"""Camera motion between two frames for tracking: predicts points and finds outlier tracks."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from kp_frontend.calibration import StereoCalibration

FEWEST = 12  # minimum number of points for an estimate
ENOUGH = 200  # number of points that the fit uses, evenly among all
ROUNDS = 4  # iterations of the trimmed fit
# Steps of each fit: the next round goes on from there.
STOP = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_COUNT, 2, 1e-6)
TRIM = 2.5  # points with an error above this multiple of the median are trimmed
SURE = 1.0  # pixels; points with a smaller error are never trimmed
LEAST_SHARE = 0.5  # minimum share of inliers; with fewer the motion is unknown
CONTRADICTS = 2.0  # pixels; minimum reprojection error of an outlier
EPIPOLAR = 1.5  # pixels; minimum distance of an outlier from its epipolar line, without depth
LEAST_PARALLAX = 1.0  # pixels; minimum median motion for the epipolar check


@dataclass(frozen=True)
class Motion:
    """Motion from the previous to the current frame: x_now = rotation @ x_before + translation."""

    rotation: np.ndarray
    translation: np.ndarray

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Transform points (N, 3) of the previous frame, metres, to the current frame."""
        return points @ self.rotation.T + self.translation


def project(points: np.ndarray, calibration: StereoCalibration) -> np.ndarray:
    """Project points (N, 3) to left rectified pixels (N, 2), NaN behind the camera."""
    z = np.where(points[:, 2] > 1e-3, points[:, 2], np.nan)
    x = calibration.fx * points[:, 0] / z + calibration.cx
    return np.column_stack([x, calibration.fy * points[:, 1] / z + calibration.cy])


def rigid_motion(
    points: np.ndarray, xy: np.ndarray, calibration: StereoCalibration, start: Motion | None
) -> tuple[Motion | None, np.ndarray]:
    """Estimate the motion that most points agree with, and its outliers.

    A trimmed fit: repeats Levenberg-Marquardt (`cv2.solvePnPRefineLM`) on the points with smaller
    errors.

    Args:
        points: (N, 3) of the previous frame, metres.
        xy: (N, 2) rectified left pixels in the current frame.
        start: initial guess; None for no motion.

    Returns:
        The motion, or None without enough inliers, and the outliers (N,) bool.
    """
    nothing = np.zeros(len(points), bool)
    if len(points) < FEWEST:
        return None, nothing
    points, xy = points.astype(np.float64), xy.astype(np.float64)
    c = calibration
    matrix = np.array([[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1]])
    motion = start or Motion(np.eye(3), np.zeros(3))
    every = -(-len(points) // ENOUGH)
    some, pixels = points[::every], xy[::every]
    for _ in range(ROUNDS):
        error = _errors(some, pixels, motion, c)
        good = error <= max(TRIM * float(np.median(error)), SURE)
        if good.sum() < FEWEST:
            return None, nothing
        turn = cv2.Rodrigues(motion.rotation)[0]
        turn, shift = cv2.solvePnPRefineLM(
            *(some[good], pixels[good], matrix, None),
            *(turn, motion.translation[:, None].copy(), STOP),
        )
        motion = Motion(cv2.Rodrigues(turn)[0], shift[:, 0])
    error = _errors(points, xy, motion, c)
    contradicts = error > CONTRADICTS
    if contradicts.mean() > 1 - LEAST_SHARE:
        return None, nothing
    return motion, contradicts


def _errors(
    points: np.ndarray, xy: np.ndarray, motion: Motion, calibration: StereoCalibration
) -> np.ndarray:
    """Reprojection errors (N,) in pixels, infinite behind the camera."""
    off = np.linalg.norm(project(motion.apply(points), calibration) - xy, axis=1)
    return np.where(np.isfinite(off), off, np.inf)


def off_epipolar(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Outliers (N,) bool of the epipolar geometry. Needs no depth.

    Args:
        before, now: (N, 2) pixels in both frames.
    """
    nothing = np.zeros(len(before), bool)
    moved = np.linalg.norm(now - before, axis=1)
    if len(before) < FEWEST or np.median(moved) < LEAST_PARALLAX:
        return nothing
    options = (cv2.USAC_MAGSAC, EPIPOLAR, 0.99, 500)
    _, mask = cv2.findFundamentalMat(before, now, *options)
    if mask is None or mask.mean() < LEAST_SHARE:
        return nothing
    return mask[:, 0] == 0
