"""Refines keyframes and landmarks in a window with GTSAM's fixed-lag smoother.

A keyframe that leaves the window is marginalised together with the landmarks that it saw first. If
the track of such a landmark continues, it becomes a new landmark. So the marginal prior connects
only poses, and the time of an update stays bounded.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, SupportsFloat, SupportsIndex, SupportsInt

import gtsam
import numpy as np
from gtsam.symbol_shorthand import L, X

from kp_frontend.calibration import StereoCalibration
from kp_frontend.odometry.config import OdometryConfig
from kp_frontend.odometry.motion import Motion, inverse, project
from kp_frontend.odometry.observations import Observations
from kp_frontend.odometry.state import AT_START, moved

Stamps = dict[SupportsInt | SupportsIndex, SupportsFloat | SupportsIndex]  # as GTSAM has it

KERNEL = 2.0  # of the Geman-McClure kernel; a right measurement is 1.7 off (three unit normals)
RELINEARISE = 0.01  # radians or metres by which an estimate moves before it is linearised anew
STEPS_TO_SIGMA = 4  # steps of a factor of two into which standard deviations are rounded
HOLD = 10.0  # standard deviations of the first guess are taken so many times as large
CELLS = (8, 4, 3)  # of the image and of the depth range, over which landmarks are spread
DEPTH_OCTAVES = 1.5  # a cell of the depth range spans so many octaves of disparity
WORSE_PX = 1.0  # a refined pose may raise the first guess's median reprojection error by this


class SmootherFailed(RuntimeError):
    """The window cannot be solved, or its solution contradicts the newest frame."""


class _Sighting(NamedTuple):
    """A measurement of a point: the keyframe, left column, right column and row (pixels), and the
    key of its noise."""

    keyframe: int
    left: float
    right: float
    row: float
    noise: tuple[int, ...]


@dataclass
class _Landmark:
    """A point in the graph: its number, the keyframe that saw it first, and its last sighting."""

    number: int
    first: int
    last: _Sighting


@dataclass(frozen=True)
class Smoothed:
    """The newest keyframe's pose (4, 4), its covariance (6, 6), rotation before translation, in
    its own frame, and the landmarks (N, 3) that it sees."""

    pose: np.ndarray
    covariance: np.ndarray
    landmarks: np.ndarray


class KeyframeSmoother:
    """A window of keyframes.

    Args:
        pose: (4, 4) of the first keyframe in the odometry's frame.
        covariance: (6, 6) of that pose, rotation before translation, in its own frame. It is kept
            out of the window and added to the results: after a long gap it is too large to solve.
    """

    def __init__(
        self,
        config: OdometryConfig,
        camera: StereoCalibration,
        size: tuple[int, int],
        pose: np.ndarray,
        covariance: np.ndarray,
        observations: Observations,
    ) -> None:
        self.config, self.camera, self.size = config, camera, size
        self._start, self._start_covariance = pose, covariance
        self._k = gtsam.Cal3_S2Stereo(
            camera.fx, camera.fy, 0.0, camera.cx, camera.cy, camera.baseline
        )
        params = gtsam.ISAM2Params()
        params.setRelinearizeThreshold(RELINEARISE)
        params.relinearizeSkip = 1
        params.findUnusedFactorSlots = True
        self._smoother = gtsam.IncrementalFixedLagSmoother(config.window - 0.5, params)
        self._kernel = gtsam.noiseModel.mEstimator.GemanMcClure.Create(KERNEL)
        self._noises: dict[tuple[int, ...], gtsam.noiseModel.Base] = {}
        self._keyframe = 0
        self._created = 0
        self._landmarks: dict[int, _Landmark] = {}
        # Of points that are no landmarks yet: when and where they were seen.
        self._seen: dict[int, deque[_Sighting]] = {}
        graph, values = gtsam.NonlinearFactorGraph(), gtsam.Values()
        noise = gtsam.noiseModel.Isotropic.Sigma(6, AT_START)
        graph.add(gtsam.PriorFactorPose3(X(0), gtsam.Pose3(pose), noise))
        values.insert(X(0), gtsam.Pose3(pose))
        self._smoother.update(graph, values, {X(0): 0.0})
        self._pose = pose
        self._remember(observations, graph)

    def add(
        self, observations: Observations, rows: np.ndarray, points: np.ndarray, motion: Motion
    ) -> Smoothed:
        """Add a keyframe and refine the window.

        Args:
            observations: all points of the keyframe; one that agrees with the motion has the
                number that it had in the keyframe before, every other one a new number.
            rows: (M,) those that were linked to the keyframe before.
            points: (M, 3) the same points in the frame of the keyframe before.
            motion: from the keyframe before to this one, with its inliers among the rows.

        Raises:
            SmootherFailed: it must be started anew.
        """
        self._keyframe += 1
        now, guess = self._keyframe, self._pose @ motion.pose
        graph, values = gtsam.NonlinearFactorGraph(), gtsam.Values()
        stamps: Stamps = {X(now): float(now)}
        values.insert(X(now), gtsam.Pose3(guess))
        # Holds the pose loosely, so that few landmarks make no singular system.
        hold = gtsam.noiseModel.Gaussian.Covariance(HOLD**2 * motion.covariance)
        step = gtsam.BetweenFactorPose3(X(now - 1), X(now), gtsam.Pose3(motion.pose), hold)
        graph.add(step)
        self._forget_old()
        fresh = self._remember(observations, graph)
        self._create(observations, fresh, guess, graph, values, stamps)
        try:
            self._smoother.update(graph, values, stamps)
            estimate = self._smoother.calculateEstimate()
            pose = estimate.atPose3(X(now)).matrix()
            covariance = self._smoother.marginalCovariance(X(now))
        except RuntimeError as error:  # what GTSAM raises for a system that cannot be solved
            raise SmootherFailed(str(error).strip().splitlines()[0]) from error
        covariance += moved(self._start_covariance, inverse(self._start) @ pose)
        before = estimate.atPose3(X(now - 1)).matrix()
        self._check(inverse(before) @ pose, motion, points, observations.pixels[rows])
        self._pose = pose
        self._estimate = estimate
        numbers = [
            self._landmarks[i].number for i in observations.ids.tolist() if i in self._landmarks
        ]
        landmarks = [estimate.atPoint3(L(number)) for number in numbers]
        return Smoothed(pose, covariance, np.reshape(landmarks, (-1, 3)))

    def refined_points(self, observations: Observations) -> np.ndarray:
        """Points (N, 3) of the newest keyframe, the landmarks among them as they were refined."""
        points = observations.points.copy()
        turn, shift = self._pose[:3, :3], self._pose[:3, 3]
        for row, number in enumerate(observations.ids.tolist()):
            if number in self._landmarks:
                place = self._estimate.atPoint3(L(self._landmarks[number].number))
                points[row] = (place - shift) @ turn
        return points

    def _forget_old(self) -> None:
        """Drop the landmarks that leave the window with their first keyframe, and old points.

        The last sighting of such a landmark begins the next one of the same point, so that it still
        ties the newest keyframes.
        """
        oldest = self._keyframe - self.config.window + 1
        for number in [i for i, mark in self._landmarks.items() if mark.first < oldest]:
            self._begin(number).append(self._landmarks.pop(number).last)
        for number in [
            i for i, seen in self._seen.items() if seen[-1].keyframe < self._keyframe - 1
        ]:
            del self._seen[number]

    def _remember(
        self,
        observations: Observations,
        graph: gtsam.NonlinearFactorGraph,
    ) -> list[int]:
        """Note what the keyframe sees; landmarks go into the graph at once.

        Returns:
            Rows of points that have been seen often enough to become landmarks.
        """
        fresh = []
        columns, lines = observations.pixels.T
        right = columns - observations.disparity
        rows = (observations.ids, columns, right, lines)
        numbers, *places = (values.tolist() for values in rows)
        each = zip(numbers, *places, self._noise_keys(observations), strict=True)
        for row, (number, u, u_right, v, noise) in enumerate(each):
            sighting = _Sighting(self._keyframe, u, u_right, v, noise)
            if number in self._landmarks:
                self._measure(graph, self._landmarks[number].number, sighting)
                self._landmarks[number].last = sighting
                continue
            seen = self._seen[number] if number in self._seen else self._begin(number)
            seen.append(sighting)
            if len(seen) >= min(self.config.min_observations, self.config.window - 1):
                fresh.append(row)
        return fresh

    def _begin(self, number: int) -> deque[_Sighting]:
        """Begin to note the sightings of a point; no more are kept than fit into the window."""
        self._seen[number] = deque(maxlen=self.config.window - 1)
        return self._seen[number]

    def _measure(self, graph: gtsam.NonlinearFactorGraph, number: int, sighting: _Sighting) -> None:
        """Add a measurement of a landmark to the graph."""
        keyframe, left, right, row, noise = sighting
        point = gtsam.StereoPoint2(left, right, row)
        graph.add(
            gtsam.GenericStereoFactor3D(point, self._noise(noise), X(keyframe), L(number), self._k)
        )

    def _create(
        self,
        observations: Observations,
        fresh: list[int],
        pose: np.ndarray,
        graph: gtsam.NonlinearFactorGraph,
        values: gtsam.Values,
        stamps: Stamps,
    ) -> None:
        """Make landmarks of points, with all that was seen of them within the window."""
        ids = observations.ids.tolist()
        known = [row for row, number in enumerate(ids) if number in self._landmarks]
        wanted = max(self.config.landmarks - len(known), 0)
        ages = np.array([len(self._seen[ids[row]]) for row in fresh])
        chosen = spread(observations, np.array(fresh, int), ages, known, self.size)[:wanted]
        places = observations.points @ pose[:3, :3].T + pose[:3, 3]
        for row in chosen.tolist():
            seen = self._seen.pop(ids[row])
            for sighting in seen:
                self._measure(graph, self._created, sighting)
            key, first = L(self._created), seen[0].keyframe
            values.insert(key, places[row])
            stamps[key] = float(first)
            self._landmarks[ids[row]] = _Landmark(self._created, first, seen[-1])
            self._created += 1

    def _noise_keys(self, observations: Observations) -> list[tuple[int, ...]]:
        """Standard deviations of position and disparity as rounded logarithms."""
        both = np.column_stack([observations.sigma, observations.disparity_sigma])
        return [tuple(row) for row in np.rint(STEPS_TO_SIGMA * np.log2(both)).astype(int).tolist()]

    def _noise(self, key: tuple[int, ...]) -> gtsam.noiseModel.Base:
        """Robust noise of (left column, right column, row), whose columns' errors go together:
        the right one is the left one's less the disparity's."""
        if key not in self._noises:
            position, disparity = (4.0 ** (k / STEPS_TO_SIGMA) for k in key)
            covariance = np.full((3, 3), 0.0)
            covariance[:2, :2] = position
            covariance[1, 1] += disparity
            covariance[2, 2] = position
            gaussian = gtsam.noiseModel.Gaussian.Covariance(covariance)
            self._noises[key] = gtsam.noiseModel.Robust.Create(self._kernel, gaussian)
        return self._noises[key]

    def _check(
        self, refined: np.ndarray, motion: Motion, points: np.ndarray, pixels: np.ndarray
    ) -> None:
        """Compare the refined motion with the first guess on what the newest frame sees.

        Raises:
            SmootherFailed: it fits much worse.
        """
        points, pixels = points[motion.inliers], pixels[motion.inliers]
        errors = [
            np.median(np.linalg.norm(project(pose, points, self.camera) - pixels, axis=1))
            for pose in (motion.pose, refined)
        ]
        if not errors[1] <= errors[0] + WORSE_PX:
            raise SmootherFailed(
                f"the refined pose is {errors[1]:.1f} px off what the frame sees, "
                f"the first guess {errors[0]:.1f} px"
            )


def spread(
    observations: Observations,
    rows: np.ndarray,
    ages: np.ndarray,
    known: list[int],
    size: tuple[int, int],
) -> np.ndarray:
    """Order rows so that the first ones are spread evenly over the image and the depth range.

    Args:
        rows: (N,) to be ordered.
        ages: (N,) keyframes in which each was seen: within a cell the longest seen come first.
        known: rows that are chosen already and fill their cells.

    Returns:
        (N,) the rows, ordered.
    """
    columns, lines, octaves = CELLS
    x = np.clip(observations.pixels[:, 0] / size[0] * columns, 0, columns - 1).astype(int)
    y = np.clip(observations.pixels[:, 1] / size[1] * lines, 0, lines - 1).astype(int)
    farthest = size[0] / 2 ** (octaves * DEPTH_OCTAVES + 2)
    depth = np.log2(np.maximum(observations.disparity / farthest, 1e-6)) / DEPTH_OCTAVES
    depth = np.clip(depth, 0, octaves - 1).astype(int)
    cell = (x * lines + y) * octaves + depth
    filled = np.bincount(cell[known], minlength=columns * lines * octaves)
    order = np.lexsort((-ages, cell[rows]))
    sorted_cells = cell[rows][order]
    first = np.searchsorted(sorted_cells, sorted_cells)
    place = np.arange(len(rows)) - first + filled[sorted_cells]
    return rows[order][np.argsort(place, kind="stable")]
