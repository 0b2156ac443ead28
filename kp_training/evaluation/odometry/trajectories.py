"""Trajectories of an odometry: how they are made, scored against true poses, and stored.

APE and RPE are evo's, the drift is KITTI's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from kp_frontend.odometry import OdometryEstimate, Status

Drift = list[tuple[float, float, float]]


@dataclass
class Trajectory:
    """Poses of the left camera in its first frame, and how they were got.

    `truth` has the true pose of each frame in any frame of reference, None where it is not known;
    `failed` the numbers of the frames whose motion could not be told. `disparity_offset` is the
    odometry's last estimate, pixels.
    """

    stamps: list[int] = field(default_factory=list)
    poses: list[np.ndarray] = field(default_factory=list)
    truth: list[np.ndarray | None] = field(default_factory=list)
    inliers: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    disparity_offset: float = 0.0

    def add(
        self, stamp: int, truth: np.ndarray | None, estimate: OdometryEstimate, ms: float
    ) -> None:
        """Take the next frame's time (ns), true pose and estimate, which took some milliseconds."""
        if estimate.status is Status.TRACKING:
            self.inliers.append(estimate.inliers)
        elif estimate.status is not Status.STARTED or self.poses:
            self.failed.append(len(self.poses))
        self.stamps.append(stamp)
        self.poses.append(estimate.pose)
        self.truth.append(truth)
        self.ms.append(ms)
        self.disparity_offset = estimate.disparity_offset

    def known(self) -> np.ndarray:
        """Numbers of the frames that have a true pose."""
        return np.array([i for i, pose in enumerate(self.truth) if pose is not None], int)

    def compared(self) -> tuple[np.ndarray, np.ndarray]:
        """Estimated and true poses (N, 4, 4) of those frames, each in the first one's frame."""
        known = self.known()
        poses = np.stack([self.poses[i] for i in known])
        truth = np.stack([pose for pose in self.truth if pose is not None])
        return np.linalg.inv(poses[0]) @ poses, np.linalg.inv(truth[0]) @ truth


@dataclass(frozen=True)
class Scores:
    """Errors of a trajectory; `drift` of each sub-sequence as (length in metres, % of it, degrees a
    metre), `steps` (metres) of each step between neighbouring frames, `ate` in metres."""

    drift: Drift
    steps: np.ndarray
    ate: float


def score(trajectory: Trajectory) -> Scores:
    """Compare a trajectory with the truth, where it is known of at least two frames."""
    from evo.core import metrics
    from evo.core.geometry import GeometryException

    estimate, truth = trajectory.compared()
    lengths = sub_lengths(float(travelled(truth)[-1]))
    pair = evo_path(truth), evo_path(estimate)
    known = trajectory.known()
    rpe = metrics.RPE(metrics.PoseRelation.translation_part, 1, metrics.Unit.frames, all_pairs=True)
    rpe.process_data(pair)
    neighbours = np.diff(known) == 1  # frames without a truth between them make no single step
    steps = np.asarray(rpe.error)[neighbours]
    try:
        pair[1].align(pair[0])
    except GeometryException:  # an exactly straight way, or a camera that stands: no turn is told
        pair[1].align_origin(pair[0])
    ape = metrics.APE(metrics.PoseRelation.translation_part)
    ape.process_data(pair)
    ate = ape.get_statistic(metrics.StatisticsType.rmse)
    return Scores(drift(estimate, truth, lengths), steps, float(ate))


def evo_path(poses: np.ndarray):  # noqa: ANN201  evo is imported only where it is used
    """Convert poses (N, 4, 4) to evo's type."""
    from evo.core.trajectory import PosePath3D

    return PosePath3D(poses_se3=list(poses))


def write_tum(path: Path, stamps: list[int], poses: Iterable[np.ndarray]) -> None:
    """Write poses (4, 4) at times (ns) as a TUM file, which evo's tools read."""
    from evo.core.trajectory import PoseTrajectory3D
    from evo.tools.file_interface import write_tum_trajectory_file

    seconds = np.array(stamps, np.longdouble) / 1e9
    trajectory = PoseTrajectory3D(poses_se3=list(poses), timestamps=seconds.astype(np.float64))
    write_tum_trajectory_file(path, trajectory)


def travelled(poses: np.ndarray) -> np.ndarray:
    """Path length at each pose (N, 4, 4), (N,) metres."""
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def drift(estimate: np.ndarray, truth: np.ndarray, lengths: Iterable[float]) -> Drift:
    """Errors of all sub-sequences of some lengths, in KITTI's way (Geiger and others, 2012).

    From every frame to the first one that is at least a length further on by the true trajectory:
    the true motion against the estimated one.

    Args:
        estimate, truth: (N, 4, 4) poses.
        lengths: metres.

    Returns:
        Length, translation error in % of it, rotation error in degrees a metre, for each
        sub-sequence.
    """
    way, errors = travelled(truth), []
    for first in range(len(truth)):
        for length in lengths:
            last = int(np.searchsorted(way, way[first] + length))
            if last == len(truth):
                continue
            moved = np.linalg.inv(truth[first]) @ truth[last]
            guessed = np.linalg.inv(estimate[first]) @ estimate[last]
            off = np.linalg.inv(guessed) @ moved
            angle = np.rad2deg(Rotation.from_matrix(off[:3, :3]).magnitude())
            share = 100 * float(np.linalg.norm(off[:3, 3])) / length
            errors.append((length, share, float(angle) / length))
    return errors


def sub_lengths(way: float) -> tuple[float, ...]:
    """Lengths of sub-sequences in metres: KITTI's 100 to 800, or eight that fit a shorter way;
    none for a camera that stands."""
    if way <= 0:
        return ()
    if way >= 800:
        return tuple(range(100, 900, 100))
    step = next((s for s in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if way >= 4 * s), way / 4)
    most = int(min(8, 0.9 * way // step))
    return tuple(step * n for n in range(1, most + 1))
