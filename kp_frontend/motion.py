"""How the camera moved between two frames, for tracking: where points are to be expected next, and
which tracks contradict the others."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from kp_frontend.calibration import StereoCalibration

FEWEST = 12  # points for an estimate
ENOUGH = 200  # points that the fit uses, evenly among all
ROUNDS = 4  # of the trimmed fit
TRIM = 2.5  # points are left out whose error is more than this many times the median
SURE = 1.0  # pixels; points with a smaller error are never left out of the fit
LEAST_SHARE = 0.5  # of the points that must agree with the motion, else it is not known
CONTRADICTS = 2.5  # pixels; a point that is farther from where the motion takes it contradicts it
EPIPOLAR = 1.5  # pixels; the same for the distance from the epipolar line, without depth
LEAST_PARALLAX = 1.0  # pixels; with less median motion epipolar lines say nothing


@dataclass(frozen=True)
class Motion:
    """Points of the frame before in the frame now: x_now = rotation @ x_before + translation."""

    rotation: np.ndarray
    translation: np.ndarray

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) of the frame before, metres, in the frame now."""
        return points @ self.rotation.T + self.translation


def project(points: np.ndarray, calibration: StereoCalibration) -> np.ndarray:
    """Left rectified pixels (N, 2) of points (N, 3), NaN where they are not in front."""
    z = np.where(points[:, 2] > 1e-3, points[:, 2], np.nan)
    x = calibration.fx * points[:, 0] / z + calibration.cx
    return np.column_stack([x, calibration.fy * points[:, 1] / z + calibration.cy])


def rigid_motion(
    points: np.ndarray, xy: np.ndarray, calibration: StereoCalibration, start: Motion | None
) -> tuple[Motion | None, np.ndarray]:
    """The motion that takes most points to their pixels, and which points contradict it.

    A trimmed fit: Levenberg-Marquardt (`cv2.solvePnPRefineLM`) over the points with the smaller
    errors, again and again.

    Args:
        points: (N, 3) of the frame before, metres.
        xy: (N, 2) rectified left pixels in the frame now.
        start: first guess; None for no motion.

    Returns:
        The motion, None if too few points agree on one, and (N,) bool.
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
            some[good], pixels[good], matrix, None, turn, motion.translation[:, None].copy()
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
    """Distance (N,) of pixels from where a motion takes points, infinite behind the camera."""
    off = np.linalg.norm(project(motion.apply(points), calibration) - xy, axis=1)
    return np.where(np.isfinite(off), off, np.inf)


def off_epipolar(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Which points contradict the epipolar geometry of the others, without depth (N,) bool.

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
