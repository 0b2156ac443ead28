"""Estimates the disparity error that all points of a stereo camera share, from its motion.

A small error of the calibration, such as a yaw angle between the cameras, adds a constant to all
disparities. It scales near and far points differently, so it does not fit the motion of the
camera: two keyframes and the way between them tell it. Without motion nothing is learnt.
"""

from __future__ import annotations

from collections import deque

import cv2
import numpy as np
from scipy.optimize import least_squares

from kp_frontend.calibration import StereoCalibration
from kp_frontend.odometry.motion import inverse
from kp_frontend.odometry.observations import Observations

APART, LEAST_APART = 5, 3  # keyframes from one to the other of the two that are compared
EVERY = 3  # only every so many keyframes, which have almost the same information
FEWEST, MOST = 40, 150  # points in both keyframes
LOSS_SCALE = 1.5  # standard deviations; of the Cauchy loss
INFLATION = 2.0  # factor for the standard deviation of an estimate: its errors are not independent
CALMEST = 0.02  # pixels; the standard deviation does not fall below, as cameras warm up
SIGNIFICANT = 2.0  # standard deviations from which the disparities are corrected
SMALLEST = 0.1  # pixels; minimum disparity of a point that is used


class DisparityOffset:
    """The constant part of the disparity error.

    `value` (pixels) is measured minus true disparity, `sigma` its standard deviation. `correction`
    is the value if it is significant, else 0: noise does no harm to an exact calibration.
    `variance` is the expected squared error of the correction. It never grows.

    Args:
        sigma: standard deviation before anything is known, pixels; 0 disables the estimation.
    """

    def __init__(self, sigma: float) -> None:
        self.value, self.sigma, self.variance = 0.0, sigma, sigma**2
        self._keyframes: deque[tuple[Observations, np.ndarray]] = deque(maxlen=APART + 1)
        self._added = 0

    @property
    def correction(self) -> float:
        """Pixels to subtract from the disparities."""
        return self.value if abs(self.value) > SIGNIFICANT * self.sigma else 0.0

    def restart(self) -> None:
        """Forget the keyframes, but not the offset."""
        self._keyframes.clear()

    def add(self, observations: Observations, pose: np.ndarray, camera: StereoCalibration) -> None:
        """Add a keyframe with its pose (4, 4); points in several keyframes have the same ids."""
        self._keyframes.append((observations, pose))
        self._added += 1
        if not self.sigma or len(self._keyframes) <= APART or self._added % EVERY:
            return
        for before, pose_before in list(self._keyframes)[: APART - LEAST_APART + 1]:
            _, a, b = np.intersect1d(before.ids, observations.ids, return_indices=True)
            if len(a) >= FEWEST:
                motion = inverse(pose) @ pose_before
                chosen = np.random.default_rng(0).permutation(len(a))[:MOST]
                found = _offset(before, a[chosen], observations, b[chosen], motion, camera)
                if found is not None:
                    self._update(*found)
                return

    def _update(self, value: float, sigma: float) -> None:
        """Fuse an estimate with what is known (a Kalman filter)."""
        variance = self.sigma**2
        gain = variance / (variance + (INFLATION * sigma) ** 2)
        self.value += gain * (value - self.value)
        self.sigma = max(float(np.sqrt((1 - gain) * variance)), CALMEST)
        squared = self.sigma**2 + (self.value - self.correction) ** 2
        self.variance = min(self.variance, squared)


def _offset(
    before: Observations,
    a: np.ndarray,
    now: Observations,
    b: np.ndarray,
    motion: np.ndarray,
    camera: StereoCalibration,
) -> tuple[float, float] | None:
    """Offset and its standard deviation (pixels) from the same points in two keyframes.

    The unknowns are the motion, the offset, and each point's disparity in the first keyframe. The
    latter are eliminated point by point (variable projection).

    Args:
        a, b: (N,) rows of the same points in both.
        motion: (4, 4) first guess, from the first keyframe's frame to the second's.
    """
    pair = _Pair(before, a, now, b, camera)
    start = np.concatenate([cv2.Rodrigues(motion[:3, :3])[0][:, 0], motion[:3, 3], [0.0]])
    solved = least_squares(
        pair.residuals, start, pair.jacobian, loss="cauchy", f_scale=LOSS_SCALE, x_scale="jac",
        ftol=1e-6, xtol=1e-6, max_nfev=15,
    )  # fmt: skip
    information = solved.jac.T @ solved.jac
    if not np.isfinite(information).all() or np.linalg.cond(information) > 1e14:
        return None
    return float(solved.x[6]), float(np.sqrt(np.linalg.inv(information)[6, 6]))


class _Pair:
    """Residuals (4 N,) of N points in two keyframes, in standard deviations, and their derivatives.

    Of each point: disparity in the first keyframe; column, row and disparity in the second. The
    parameters (7,) are rotation vector, translation and offset.
    """

    def __init__(
        self, before: Observations, a: np.ndarray, now: Observations, b: np.ndarray,
        camera: StereoCalibration,
    ) -> None:  # fmt: skip
        self._camera = camera
        principal, focal = (camera.cx, camera.cy), (camera.fx, camera.fy)
        ones = np.ones((len(a), 1))
        self._rays = np.hstack([(before.pixels[a] - principal) / focal, ones])
        self._first = before.disparity[a] + before.offset
        self._second = np.column_stack([now.pixels[b], now.disparity[b] + now.offset])
        pixel = np.hypot(before.sigma[a], now.sigma[b])
        sigmas = [before.disparity_sigma[a], pixel, pixel, now.disparity_sigma[b]]
        self._sigmas = np.column_stack(sigmas)

    def residuals(self, x: np.ndarray) -> np.ndarray:
        """Residuals (4 N,) with the best disparity of each point."""
        return self._at(x, self._best(x))[0].ravel()

    def jacobian(self, x: np.ndarray) -> np.ndarray:
        """Derivatives (4 N, 7), without the part that the points' disparities take up."""
        disparity = self._best(x)
        _, by_disparity, by_point, points = self._at(x, disparity)
        turns = cv2.Rodrigues(x[:3])[1].reshape(3, 3, 3)
        by_turn = np.einsum("kij,nj->nik", turns, points)
        by_motion = np.concatenate([by_point @ by_turn, by_point], 2)
        full = np.zeros((len(disparity), 4, 7))
        full[:, 1:, :6] = by_motion
        full[:, [0, 3], 6] = 1
        full /= -self._sigmas[:, :, None]
        along = np.einsum("ni,nik->nk", by_disparity, full)
        along /= np.square(by_disparity).sum(1)[:, None]
        return (full - by_disparity[:, :, None] * along[:, None]).reshape(-1, 7)

    def _best(self, x: np.ndarray) -> np.ndarray:
        """The disparity (N,) of each point in the first keyframe that fits best."""
        disparity = np.maximum(self._first - x[6], SMALLEST)
        for _ in range(3):
            residuals, slope, *_ = self._at(x, disparity)
            step = (residuals * slope).sum(1) / np.square(slope).sum(1)
            disparity = np.maximum(disparity - step, SMALLEST)
        return disparity

    def _at(self, x: np.ndarray, disparity: np.ndarray) -> tuple[np.ndarray, ...]:
        """At given disparities (N,): residuals (N, 4), their derivatives (N, 4) by the disparity,
        those of column, row and disparity (N, 3, 3) by the point in the second keyframe, and the
        points (N, 3) in the first."""
        c = self._camera
        depth = c.fx * c.baseline / disparity
        points = self._rays * depth[:, None]
        turn = cv2.Rodrigues(x[:3])[0]
        px, py, pz = (points @ turn.T + x[3:6]).T
        pz = np.maximum(pz, 1e-3)
        scales = np.array([c.fx, c.fy, c.fx * c.baseline])
        seen = np.column_stack([px, py, np.ones_like(px)]) / pz[:, None] * scales
        by_point = np.zeros((len(px), 3, 3))
        by_point[:, 0, 0], by_point[:, 1, 1] = c.fx / pz, c.fy / pz
        by_point[:, :, 2] = -seen / pz[:, None]
        moves = self._rays @ turn.T * (-depth / disparity)[:, None]
        seen[:, :2] += c.cx, c.cy
        error = self._second - seen
        error[:, 2] -= x[6]
        residuals = np.column_stack([self._first - disparity - x[6], error]) / self._sigmas
        slope = np.column_stack([np.ones_like(px), np.einsum("nij,nj->ni", by_point, moves)])
        return residuals, -slope / self._sigmas, by_point, points
