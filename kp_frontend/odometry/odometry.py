"""StereoOdometry: estimates the pose and velocity of the camera from the features of each pair."""

from __future__ import annotations

import enum
import importlib.util
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from kp_frontend.calibration import StereoCalibration
from kp_frontend.features import StereoFeatures
from kp_frontend.odometry.config import OdometryConfig
from kp_frontend.odometry.motion import (
    Expected,
    Motion,
    choose_solver,
    find_motion,
    inverse,
    project,
)
from kp_frontend.odometry.observations import Observations, link, observe
from kp_frontend.odometry.offset import DisparityOffset
from kp_frontend.odometry.state import (
    OffsetPart,
    State,
    given_out,
    moved,
    predict,
    state_at_rest,
    velocity_between,
)

if TYPE_CHECKING:
    from kp_frontend.odometry.smoother import KeyframeSmoother

NO_LANDMARKS = np.zeros((0, 3))
# Reasons of an estimate
FIRST_PAIR = "first pair"
NOT_NEWER = "time stamp is not newer than the last one"
# Percentile of the points' parallaxes. Near points show the translation, far ones hardly move.
NEAR_PERCENTILE = 80


class Status(enum.Enum):
    """How an estimate was obtained."""

    STARTED = "started"  # the first pair, or the first one after a restart
    TRACKING = "tracking"  # motion estimated from the points
    PREDICTED = "predicted"  # motion unknown: constant velocity, larger covariance
    REJECTED = "rejected"  # the pair cannot be used; repeats the previous estimate


@dataclass(frozen=True)
class OdometryEstimate:
    """Pose and velocity of the camera.

    `stamp` in nanoseconds. `pose` (4, 4) of the left rectified optical frame in the odometry frame,
    which is the left rectified optical frame of the first pair; metres. `covariance` (6, 6) of
    position (m) before rotation (rad), about the axes of the odometry frame. `velocity` (6,) linear
    (m/s) before angular (rad/s), along the axes of the camera, with `velocity_covariance` (6, 6).
    `reason` explains a status other than `TRACKING`, or a recovery. `matches` is the number of
    points matched to the keyframe, `inliers` the number of those that agree with the motion.
    `landmarks` (N, 3) are points in the odometry frame, metres. `disparity_offset` is the constant
    error of the disparities as estimated so far, pixels.
    """

    stamp: int
    pose: np.ndarray
    covariance: np.ndarray
    velocity: np.ndarray
    velocity_covariance: np.ndarray
    status: Status
    reason: str = ""
    keyframe: bool = False
    matches: int = 0
    inliers: int = 0
    landmarks: np.ndarray = field(default_factory=lambda: NO_LANDMARKS)
    disparity_offset: float = 0.0


class NoMotion(Exception):
    """The motion between two pairs cannot be estimated. The message gives the reason."""


@dataclass
class _Keyframe:
    """The frame that later frames are compared with.

    `pose` (4, 4) and `covariance` (6, 6) at `stamp` (ns), with the camera and the image size.
    `covariance` is without `offset_part`. `most_inliers` is the largest number of its points that a
    later frame has found.
    """

    stamp: int
    observations: Observations
    camera: StereoCalibration
    size: tuple[int, int]
    pose: np.ndarray
    covariance: np.ndarray
    most_inliers: int = 0
    offset_part: OffsetPart = field(default_factory=OffsetPart)


@dataclass(frozen=True)
class _Link:
    """Link of a frame to a keyframe: rows of the same points in both, and the motion."""

    keyframe: _Keyframe
    before: np.ndarray
    now: np.ndarray
    motion: Motion


class StereoOdometry:
    """Keyframe-based stereo odometry from features.

    RANSAC estimates the motion of each frame since the last keyframe. A frame that has moved far
    enough, or that sees too few of the keyframe's points, becomes the next keyframe. The keyframes
    of a window are refined together with their landmarks. If the motion cannot be estimated, the
    pose is predicted with constant velocity and the status is `PREDICTED`.

    `counts` is the number of skipped or repaired inputs since the start, by reason. `offset` is the
    estimated constant error of the disparities.

    Raises:
        ValueError: the config needs PoseLib or GTSAM, which is not installed.
    """

    def __init__(self, config: OdometryConfig | None = None) -> None:
        self.config = config or OdometryConfig()
        self.solver = choose_solver(self.config.solver)
        if self.config.smoothing:
            _need_gtsam()
        self.counts: Counter[str] = Counter()
        self.offset = DisparityOffset(self.config.calibration_sigma)
        self.reset()

    def reset(self) -> None:
        """Restart at the origin with the next pair. `counts` and `offset` are kept."""
        self._next_id = 0
        self.offset.restart()
        self._last: State | None = None
        self._keyframe: _Keyframe | None = None
        self._lost_from: _Keyframe | None = None  # the keyframe before the motion was lost
        self._smoother: KeyframeSmoother | None = None
        self._landmarks = NO_LANDMARKS

    def forget_tracks(self) -> None:
        """Ignore the track ids so far, because the front end has restarted and counts anew.

        The next pair is matched by descriptor.
        """
        for keyframe in (self._keyframe, self._lost_from):
            if keyframe is not None:
                keyframe.observations.tracks[:] = 0

    def __call__(self, features: StereoFeatures, stamp: int) -> OdometryEstimate:
        """Process the next pair.

        Args:
            features: features of the pair, with its calibration.
            stamp: time stamp, nanoseconds.
        """
        reason = FIRST_PAIR
        if self._last is not None and stamp <= self._last.stamp:
            if stamp > self._last.stamp - 1e9 * self.config.max_gap:
                return self._rejected(NOT_NEWER, stamp)
            reason = self._break("time jumped back", stamp, self._last)
        camera, size = features.calibration, (features.width, features.height)
        if camera is None:
            return self._without_motion("no calibration", stamp, None)
        now, left_out = observe(features, camera, self.config, self.offset.correction)
        self.counts.update(left_out)
        keyframe, last = self._keyframe, self._last
        if keyframe is not None and (camera, size) != (keyframe.camera, keyframe.size):
            reason = self._break("calibration changed", stamp, last)
            self.offset = DisparityOffset(self.config.calibration_sigma)
            keyframe = None
        fresh = _Keyframe(stamp, now, camera, size, np.eye(4), np.eye(6))
        if keyframe is None or last is None:
            return self._without_motion(reason, stamp, fresh)
        try:
            found = self._find(keyframe, fresh, last)
        except NoMotion as error:
            return self._without_motion(str(error), stamp, fresh)
        return self._go_on(found, fresh, last)

    def _break(self, reason: str, stamp: int, last: State | None) -> str:
        """Restart from the current pose at another time, without the points so far."""
        self.counts[reason] += 1
        self._keyframe = self._lost_from = self._smoother = None
        self.offset.restart()
        if last is not None:
            later = predict(last, last.stamp + int(1e9 * self.config.max_gap), self.config)
            # The velocity from here on is unknown.
            covariance = later.covariance + later.offset_part.covariance
            self._last = state_at_rest(stamp - 1, last.pose, covariance)
        return reason

    def _find(self, keyframe: _Keyframe, fresh: _Keyframe, last: State) -> _Link:
        """Link a pair to the keyframe, or to the one before the motion was lost.

        Raises:
            NoMotion: neither has enough points in common with it.
        """
        # Only the covariance of the motion since the last frame.
        expected = predict(replace(last, covariance=np.zeros((6, 6))), fresh.stamp, self.config)
        if self._lost_from is not None:
            try:
                return self._link(self._lost_from, fresh, expected)
            except NoMotion:
                pass  # try the current keyframe
        return self._link(keyframe, fresh, expected)

    def _link(self, keyframe: _Keyframe, fresh: _Keyframe, expected: State) -> _Link:
        """Estimate the motion since a keyframe.

        Raises:
            NoMotion: it cannot be estimated.
        """
        before, now = keyframe.observations, fresh.observations
        a, b = link(before, now, keyframe.size[0], self.config)
        if len(a) < self.config.min_inliers:
            few = len(now) < self.config.min_inliers
            raise NoMotion("too few points" if few else "too few matches")
        guess = Expected(inverse(keyframe.pose) @ expected.pose, expected.covariance)
        motion = find_motion(
            before.points[a], now.pixels[b], keyframe.camera, keyframe.size, self.config, guess
        )
        if motion is None:
            raise NoMotion("the matches agree on no motion")
        return _Link(keyframe, a, b, motion)

    def _go_on(self, found: _Link, fresh: _Keyframe, last: State) -> OdometryEstimate:
        """Apply the motion of a pair, and make the pair a keyframe if one is due."""
        keyframe, motion, stamp, reason = found.keyframe, found.motion, fresh.stamp, ""
        if keyframe is self._lost_from:
            self._smoother = None
            reason = f"found again after {(stamp - keyframe.stamp) / 1e9:.2f} s"
        self._keyframe, self._lost_from = keyframe, None
        fresh.pose = keyframe.pose @ motion.pose
        fresh.covariance = moved(keyframe.covariance, motion.pose) + motion.covariance
        fresh.offset_part = keyframe.offset_part.moved(
            motion.pose, motion.by_offset, self.offset.variance
        )
        # A predicted pose has no information about the velocity.
        since = last if last.seen == last.stamp else keyframe
        seconds = (stamp - since.stamp) / 1e9
        velocity = velocity_between(since.pose, fresh.pose, seconds)
        before = since.offset_part.moved(inverse(since.pose) @ fresh.pose)
        by_offset = fresh.offset_part.by_offset - before.by_offset
        change = 2 * motion.covariance + self.offset.variance * np.outer(by_offset, by_offset)
        is_keyframe = self._moved_on(found)
        if is_keyframe:
            reason = self._add_keyframe(found, fresh) or reason
        state = State(
            stamp, fresh.pose, fresh.covariance, velocity, change / seconds**2, stamp,
            fresh.offset_part,
        )  # fmt: skip
        self._last = state
        return replace(
            self._estimate(state, Status.TRACKING, reason),
            keyframe=is_keyframe,
            matches=len(found.now),
            inliers=int(motion.inliers.sum()),
        )

    def _moved_on(self, found: _Link) -> bool:
        """Whether a frame becomes the next keyframe."""
        keyframe, motion = found.keyframe, found.motion
        inliers = int(motion.inliers.sum())
        keyframe.most_inliers = max(keyframe.most_inliers, inliers)
        if inliers < self.config.keyframe_overlap * keyframe.most_inliers:
            return True
        if not self.config.keyframe_parallax:
            return True
        turned = np.eye(4)
        turned[:3, :3] = motion.pose[:3, :3]
        points = keyframe.observations.points[found.before[motion.inliers]]
        places = [project(pose, points, keyframe.camera) for pose in (motion.pose, turned)]
        shift = np.linalg.norm(places[0] - places[1], axis=1)
        return bool(np.nanpercentile(shift, NEAR_PERCENTILE) > self.config.keyframe_parallax)

    def _add_keyframe(self, found: _Link, fresh: _Keyframe) -> str:
        """Make a pair the next keyframe and refine its pose.

        Returns:
            The reason if the smoother failed, else an empty string.
        """
        before, now, motion = found.keyframe.observations, fresh.observations, found.motion
        now.ids[found.now[motion.inliers]] = before.ids[found.before[motion.inliers]]
        self._number(now)
        self._keyframe = fresh
        note = self._smooth(found, fresh) if self.config.smoothing else ""
        self.offset.add(now, fresh.pose, fresh.camera)
        return note

    def _smooth(self, found: _Link, fresh: _Keyframe) -> str:
        """Refine the pose and the points of a new keyframe.

        Returns:
            The reason if the smoother failed, else an empty string.
        """
        before, now, motion = found.keyframe.observations, fresh.observations, found.motion
        from kp_frontend.odometry.smoother import KeyframeSmoother, SmootherFailed

        if self._smoother is None:
            old = found.keyframe
            self._smoother = KeyframeSmoother(
                self.config, old.camera, old.size, old.pose, old.covariance, before
            )
        points = before.points[found.before]
        try:
            smoothed = self._smoother.add(now, found.now, points, motion)
        except SmootherFailed as error:
            self.counts["smoother restarted"] += 1
            self._smoother = None
            return f"smoother restarted: {error}"
        fresh.pose, fresh.covariance = smoothed.pose, smoothed.covariance
        self._landmarks = smoothed.landmarks
        now.points = self._smoother.refined_points(now)
        return ""

    def _number(self, observations: Observations) -> None:
        """Assign ids to the points that have none."""
        new = np.flatnonzero(observations.ids < 0)
        observations.ids[new] = self._next_id + np.arange(len(new))
        self._next_id += len(new)

    def _without_motion(self, reason: str, stamp: int, fresh: _Keyframe | None) -> OdometryEstimate:
        """Predict the pose of a pair. If it has enough points, it becomes the keyframe."""
        enough = fresh is not None and len(fresh.observations) >= 2 * self.config.min_inliers
        started = self._keyframe is None and enough
        if self._keyframe is None and fresh is not None and not enough:
            reason = "too few points"
        if self._last is None and not enough:
            return self._rejected(reason, stamp)
        if not started:
            self.counts[reason] += 1
        if self._last is None:
            state = state_at_rest(stamp, np.eye(4))
        else:
            state = predict(self._last, stamp, self.config)
        if fresh is not None and enough:
            keyframe = self._lost_from or self._keyframe
            recent = keyframe and stamp - keyframe.stamp <= 1e9 * self.config.max_gap
            self._lost_from = keyframe if recent else None
            fresh.pose, fresh.covariance = state.pose, state.covariance
            fresh.offset_part = state.offset_part
            self._number(fresh.observations)
            self._keyframe, self._smoother = fresh, None
            self.offset.restart()
        self._last = state
        return self._estimate(state, Status.STARTED if started else Status.PREDICTED, reason)

    def _rejected(self, reason: str, stamp: int) -> OdometryEstimate:
        """Repeat the previous estimate for a pair that is skipped."""
        self.counts[reason] += 1
        state = self._last or state_at_rest(stamp, np.eye(4))
        return self._estimate(state, Status.REJECTED, reason)

    def _estimate(self, state: State, status: Status, reason: str) -> OdometryEstimate:
        return OdometryEstimate(
            state.stamp,
            state.pose,
            given_out(state.covariance + state.offset_part.covariance, state.pose[:3, :3]),
            np.roll(state.velocity, 3),
            given_out(state.velocity_covariance, np.eye(3)),
            status,
            reason,
            landmarks=self._landmarks,
            disparity_offset=self.offset.value,
        )


def _need_gtsam() -> None:
    """Check that GTSAM is installed. Only the smoother imports it.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("gtsam") is None:
        raise ValueError("smoothing needs GTSAM: pip install gtsam, or set smoothing to false")
