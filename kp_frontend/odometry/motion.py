"""Motion of a camera between two frames, from 3-D points and their pixels.

Uses PoseLib's LO-RANSAC, or OpenCV's USAC if PoseLib is not installed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.optimize import least_squares

from kp_frontend.calibration import StereoCalibration
from kp_frontend.odometry.config import OdometryConfig

FEWEST_ROUNDS, MOST_ROUNDS, CONFIDENCE = 100, 1000, 0.9999
LOSS_SCALE = 0.5  # pixels; of the Cauchy loss of the refinement
SURPRISE = 6.0  # standard deviations from the expected pose above which a motion is doubtful
RIVAL = 0.2  # share of a doubtful motion's inliers that an expected motion needs to replace it
FINEST = 0.1  # pixels; minimum standard deviation of a reprojection error


@dataclass(frozen=True)
class Expected:
    """Expected pose (4, 4) of the current camera in the frame of the previous camera, with its
    covariance (6, 6) as in `Motion`."""

    pose: np.ndarray
    covariance: np.ndarray

    def surprise(self, pose: np.ndarray) -> float:
        """Distance of another pose in standard deviations."""
        step = inverse(self.pose) @ pose
        off = np.concatenate([cv2.Rodrigues(step[:3, :3])[0][:, 0], step[:3, 3]])
        return float(np.sqrt(off @ np.linalg.solve(self.covariance, off)))


@dataclass(frozen=True)
class Motion:
    """Motion of a camera.

    `pose` (4, 4) of the current camera in the frame of the previous one, `inliers` (N,) bool, and
    `covariance` (6, 6) of the pose, rotation (rad) before translation (m), in the frame of the
    current camera. `by_offset` (6,) is the derivative of the pose by the offset (pixels) that was
    subtracted from the disparities of the points, in the same order and frame.
    """

    pose: np.ndarray
    inliers: np.ndarray
    covariance: np.ndarray
    by_offset: np.ndarray


def choose_solver(name: str) -> str:
    """Resolve the setting `solver` to `poselib` or `opencv`.

    Raises:
        ValueError: PoseLib is selected but not installed.
    """
    installed = importlib.util.find_spec("poselib") is not None
    if name == "poselib" and not installed:
        raise ValueError("solver is poselib, which is not installed: pip install poselib")
    return ("poselib" if installed else "opencv") if name == "auto" else name


def find_motion(
    points: np.ndarray,
    pixels: np.ndarray,
    camera: StereoCalibration,
    size: tuple[int, int],
    config: OdometryConfig,
    expected: Expected | None = None,
) -> Motion | None:
    """Estimate the motion that most points agree with.

    A large moving object may have more points than the static scene. So a motion that contradicts
    the expected one is accepted only if no motion near the expected one has enough inliers.

    Args:
        points: (N, 3) in the frame of the previous camera, metres.
        pixels: (N, 2) their pixels in the current image.
        size: width and height of the image.

    Returns:
        The motion, or None without enough inliers.
    """
    found = _solve(points, pixels, camera, size, config)
    if found is None:
        return None
    pose, inliers = found
    if expected is not None and expected.surprise(pose) > SURPRISE:
        errors = _errors(expected.pose, points, pixels, camera)
        near = errors < config.inlier_threshold
        rival = _solve(points[near], pixels[near], camera, size, config)
        if rival is not None and expected.surprise(rival[0]) < SURPRISE:
            agree = _errors(rival[0], points, pixels, camera) < config.inlier_threshold
            if agree.sum() >= RIVAL * inliers.sum():
                pose, inliers = rival[0], agree
    uncertainty = _uncertainty(pose, points[inliers], pixels[inliers], camera)
    return None if uncertainty is None else Motion(pose, inliers, *uncertainty)


def _solve(
    points: np.ndarray,
    pixels: np.ndarray,
    camera: StereoCalibration,
    size: tuple[int, int],
    config: OdometryConfig,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Pose (4, 4) and inliers (N,) bool from the solver of the config, or None without enough
    inliers."""
    if len(points) < config.min_inliers:
        return None
    by = _by_poselib if choose_solver(config.solver) == "poselib" else _by_opencv
    now_from_before = by(points, pixels, camera, size, config.inlier_threshold)
    if now_from_before is None or not np.isfinite(now_from_before).all():
        return None
    pose = inverse(now_from_before)
    inliers = _errors(pose, points, pixels, camera) < config.inlier_threshold
    return (pose, inliers) if inliers.sum() >= config.min_inliers else None


def _by_poselib(
    points: np.ndarray,
    pixels: np.ndarray,
    camera: StereoCalibration,
    size: tuple[int, int],
    threshold: float,
) -> np.ndarray | None:
    import poselib

    model = {
        "model": "PINHOLE",
        "width": size[0],
        "height": size[1],
        "params": [camera.fx, camera.fy, camera.cx, camera.cy],
    }
    ransac = {
        "max_reproj_error": threshold,
        "min_iterations": FEWEST_ROUNDS,
        "max_iterations": MOST_ROUNDS,
        "success_prob": CONFIDENCE,
        "seed": 0,
    }
    refinement = {"loss_type": "CAUCHY", "loss_scale": LOSS_SCALE}
    pose, _ = poselib.estimate_absolute_pose(pixels, points, model, ransac, refinement)
    return np.vstack([pose.Rt, [0, 0, 0, 1]])


def _by_opencv(
    points: np.ndarray,
    pixels: np.ndarray,
    camera: StereoCalibration,
    size: tuple[int, int],
    threshold: float,
) -> np.ndarray | None:
    k = np.array([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1]])
    params = cv2.UsacParams()
    params.threshold = threshold
    params.confidence = CONFIDENCE
    params.maxIterations = MOST_ROUNDS
    params.score = cv2.SCORE_METHOD_MSAC
    params.loMethod = cv2.LOCAL_OPTIM_NULL  # the refinement below does better, in less time
    params.randomGeneratorState = 0
    found, _, turn, shift, inliers = cv2.solvePnPRansac(points, pixels, k, None, params=params)
    if not found or inliers is None:
        return None
    inliers = inliers[:, 0]
    return _refined(points[inliers], pixels[inliers], k, np.concatenate([turn, shift])[:, 0])


def _refined(
    points: np.ndarray, pixels: np.ndarray, k: np.ndarray, motion: np.ndarray
) -> np.ndarray:
    """Refine a motion (rotation vector and translation) on its inliers with a Cauchy loss.

    The trust region accepts no step that raises the loss. `cv2.solvePnPRefineLM` may diverge even
    with a thousand inliers, if many of them are far away, and weights all inliers alike.

    Returns:
        The motion as a matrix (4, 4).
    """

    def errors(x: np.ndarray) -> np.ndarray:
        return (cv2.projectPoints(points, x[:3], x[3:], k, None)[0][:, 0] - pixels).ravel()

    def jacobian(x: np.ndarray) -> np.ndarray:
        return cv2.projectPoints(points, x[:3], x[3:], k, None)[1][:, :6]

    refined = least_squares(
        errors, motion, jacobian, loss="cauchy", f_scale=LOSS_SCALE, x_scale="jac", ftol=1e-6,
        xtol=1e-6, max_nfev=20,
    ).x  # fmt: skip
    return _matrix(refined[:3], refined[3:, None])


def _matrix(turn: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Pose (4, 4) from a rotation vector and a translation."""
    pose = np.eye(4)
    pose[:3, :3] = cv2.Rodrigues(turn)[0]
    pose[:3, 3] = shift[:, 0]
    return pose


def inverse(pose: np.ndarray) -> np.ndarray:
    """The inverse of a rigid motion (4, 4)."""
    result = np.eye(4)
    result[:3, :3] = pose[:3, :3].T
    result[:3, 3] = -pose[:3, :3].T @ pose[:3, 3]
    return result


def project(pose: np.ndarray, points: np.ndarray, camera: StereoCalibration) -> np.ndarray:
    """Pixels (N, 2) of points (N, 3) for a camera with a pose (4, 4); NaN behind it."""
    seen = (points - pose[:3, 3]) @ pose[:3, :3]
    z = np.where(seen[:, 2:] > 1e-6, seen[:, 2:], np.nan)
    return seen[:, :2] / z * (camera.fx, camera.fy) + (camera.cx, camera.cy)


def _errors(
    pose: np.ndarray, points: np.ndarray, pixels: np.ndarray, camera: StereoCalibration
) -> np.ndarray:
    """Reprojection errors (N,) pixels, infinite behind the camera."""
    errors = np.linalg.norm(project(pose, points, camera) - pixels, axis=1)
    return np.where(np.isnan(errors), np.inf, errors)


def _uncertainty(
    pose: np.ndarray, points: np.ndarray, pixels: np.ndarray, camera: StereoCalibration
) -> tuple[np.ndarray, np.ndarray] | None:
    """Covariance (6, 6) of a pose from the spread of its inliers' errors, and its derivative (6,)
    by the offset of the disparities, or None if the motion in some direction is unobservable."""
    seen = (points - pose[:3, 3]) @ pose[:3, :3]
    x, y, z = seen.T
    zero = np.zeros_like(x)
    # Derivatives of a pixel by the point, and of the point by the camera pose.
    by_point = np.stack(
        [
            np.column_stack([camera.fx / z, zero, -camera.fx * x / z**2]),
            np.column_stack([zero, camera.fy / z, -camera.fy * y / z**2]),
        ],
        1,
    )
    cross = np.stack(
        [
            np.column_stack([zero, -z, y]),
            np.column_stack([z, zero, -x]),
            np.column_stack([-y, x, zero]),
        ],
        1,
    )
    by_pose = np.concatenate([cross, np.broadcast_to(-np.eye(3), cross.shape)], 2)
    jacobian = (by_point @ by_pose).reshape(-1, 6)
    errors = project(pose, points, camera) - pixels
    sigma = max(1.4826 * float(np.median(np.abs(errors))), FINEST)
    information = jacobian.T @ jacobian
    if np.linalg.cond(information) > 1e14:
        return None
    # The pose minimises a Cauchy loss. A point's depth is proportional to 1 / (disparity - offset).
    weights = np.repeat(1 / (1 + np.square(errors).sum(1) / LOSS_SCALE**2), 2)
    points_by_offset = points * points[:, 2:] / (camera.fx * camera.baseline)
    pixels_by_offset = by_point @ (points_by_offset @ pose[:3, :3])[:, :, None]
    weighted = (jacobian * weights[:, None]).T
    by_offset = -np.linalg.solve(weighted @ jacobian, weighted @ pixels_by_offset.ravel())
    return sigma**2 * np.linalg.inv(information), by_offset
