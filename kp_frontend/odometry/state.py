"""Poses with velocity and covariance, and their prediction.

Inside the odometry, covariances and velocities have rotation before translation, along the axes of
the camera, as in GTSAM.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from kp_frontend.odometry.config import OdometryConfig
from kp_frontend.odometry.motion import inverse

AT_START = 1e-6  # rad and m; standard deviation of the first pose, which is the origin
UNKNOWN_VELOCITY = 10.0  # m/s and rad/s; standard deviation before two frames have been seen
UNKNOWN_TURN = np.pi / np.sqrt(3)  # rad; standard deviation of any angle


@dataclass(frozen=True)
class OffsetPart:
    """The part of a pose's error that comes from the error of the disparity offset.

    All motions have the same error of the offset, so their errors add up. `by_offset` (6,) is the
    derivative of the pose by it, `covariance` (6, 6) the covariance of this part. When the offset
    becomes better known, poses keep the error that they have.
    """

    by_offset: np.ndarray = field(default_factory=lambda: np.zeros(6))
    covariance: np.ndarray = field(default_factory=lambda: np.zeros((6, 6)))

    def moved(
        self, step: np.ndarray, by_offset: np.ndarray | None = None, variance: float = 0.0
    ) -> OffsetPart:
        """Propagate over a step (4, 4) with its own derivative (6,); `variance` of the offset."""
        before = adjoint(inverse(step)) @ self.by_offset
        after = before if by_offset is None else before + by_offset
        grown = variance * (np.outer(after, after) - np.outer(before, before))
        return OffsetPart(after, moved(self.covariance, step) + grown)


@dataclass(frozen=True)
class State:
    """A camera at a time (ns).

    `pose` (4, 4) in the odometry's frame and `velocity` (6,), rad/s and m/s, with their
    covariances (6, 6). `seen` is the time when the motion was last told by points. `covariance` is
    without `offset_part`.
    """

    stamp: int
    pose: np.ndarray
    covariance: np.ndarray
    velocity: np.ndarray
    velocity_covariance: np.ndarray
    seen: int
    offset_part: OffsetPart = field(default_factory=OffsetPart)


def state_at_rest(stamp: int, pose: np.ndarray, covariance: np.ndarray | None = None) -> State:
    """A state with unknown velocity. Without a covariance, the pose is the exact origin."""
    if covariance is None:
        covariance = AT_START**2 * np.eye(6)
    return State(stamp, pose, covariance, np.zeros(6), UNKNOWN_VELOCITY**2 * np.eye(6), seen=stamp)


def predict(state: State, stamp: int, config: OdometryConfig) -> State:
    """Predict the state at a later time (ns) with constant velocity.

    The velocity is kept for `max_gap` after the motion was last known. After that the camera is
    assumed to be at rest. The covariance always grows.
    """
    ahead = max(stamp - state.stamp, 0) / 1e9
    going = min(ahead, max(state.seen / 1e9 + config.max_gap - state.stamp / 1e9, 0.0))
    step = np.eye(4)
    step[:3, :3] = cv2.Rodrigues(state.velocity[:3] * going)[0]
    step[:3, 3] = step[:3, :3] @ state.velocity[3:] * going
    change = np.repeat([config.angular_acceleration, config.acceleration], 3) * ahead
    change = np.minimum(change, UNKNOWN_VELOCITY)  # robots do not accelerate for long
    # After `max_gap` the camera may be at rest or still moving.
    stray = np.abs(state.velocity) * (ahead - going)
    grown = state.velocity_covariance * ahead**2 + np.diag((change * ahead / 2) ** 2 + stray**2)
    covariance = moved(state.covariance, step) + grown
    # An orientation cannot be more than unknown.
    turn = np.sqrt(np.diag(covariance)[:3])
    scale = np.append(np.minimum(UNKNOWN_TURN / np.maximum(turn, 1e-12), 1), np.ones(3))
    return State(
        stamp,
        state.pose @ step,
        covariance * np.outer(scale, scale),
        state.velocity if going == ahead else np.zeros(6),
        state.velocity_covariance + np.diag(change**2),
        state.seen,
        state.offset_part.moved(step),
    )


def velocity_between(before: np.ndarray, after: np.ndarray, seconds: float) -> np.ndarray:
    """Velocity (6,) on the way between two poses (4, 4), along the axes of the latter."""
    step = inverse(before) @ after
    turn = cv2.Rodrigues(step[:3, :3])[0][:, 0]
    return np.concatenate([turn, step[:3, :3].T @ step[:3, 3]]) / seconds


def moved(covariance: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Propagate the covariance (6, 6) of a pose over a known step (4, 4)."""
    back = adjoint(inverse(step))
    return back @ covariance @ back.T


def adjoint(pose: np.ndarray) -> np.ndarray:
    """Adjoint (6, 6) of a pose (4, 4): converts a small motion in its frame to that in the parent
    frame."""
    x, y, z = pose[:3, 3]
    result = np.zeros((6, 6))
    result[:3, :3] = result[3:, 3:] = pose[:3, :3]
    result[3:, :3] = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ pose[:3, :3]
    return result


def given_out(covariance: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Reorder a covariance (6, 6) to translation before rotation, and rotate its axes by `turn`
    (3, 3) from those of the camera."""
    swap = np.zeros((6, 6))
    swap[:3, 3:] = swap[3:, :3] = turn
    return swap @ covariance @ swap.T
