"""What a stereo front end would give in a made world of points: positions, tracks and depth."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.spatial.transform import Rotation

from kp_frontend.calibration import StereoCalibration
from kp_frontend.features import Features, StereoFeatures

CAMERA = StereoCalibration(400.0, 400.0, 320.0, 240.0, 0.2)
WIDTH, HEIGHT = 640, 480
INTERVAL = 100_000_000  # nanoseconds between pairs
NEAREST, FARTHEST = 0.8, 60.0  # metres


def pose(shift: tuple = (0, 0, 0), turn: tuple = (0, 0, 0)) -> np.ndarray:
    """Pose (4, 4) from a shift in metres and a rotation vector in radians."""
    result = np.eye(4)
    result[:3, :3] = Rotation.from_rotvec(turn).as_matrix()
    result[:3, 3] = shift
    return result


def way(step: np.ndarray, count: int) -> list[np.ndarray]:
    """Poses of a camera that makes the same step (4, 4) again and again."""
    poses = [np.eye(4)]
    while len(poses) < count:
        poses.append(poses[-1] @ step)
    return poses


@dataclass
class Points:
    """Points (N, 3) in the world, with a descriptor and a track id each."""

    places: np.ndarray
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    first_id: int = 1

    def __post_init__(self) -> None:
        count = len(self.places)
        found = self.rng.normal(size=(count, 64))
        self.descriptors = np.float32(found / np.linalg.norm(found, axis=1, keepdims=True))
        self.ids = np.arange(self.first_id, self.first_id + count)


def corridor(count: int = 3000, length: float = 25.0, seed: int = 0) -> Points:
    """Points on the walls, the floor and the ceiling of a corridor along z, and at its end."""
    rng = np.random.default_rng(seed)
    side = rng.integers(0, 4, count)
    across, along = rng.uniform(-2, 2, count), rng.uniform(-length / 4, length, count)
    x = np.where(side == 0, -2, np.where(side == 1, 2, across))
    y = np.where(side == 2, -1.5, np.where(side == 3, 1.5, 0.75 * across))
    places = np.column_stack([x, y, along])
    places[rng.random(count) < 0.02, 2] = length
    return Points(places, rng)


def room(count: int = 3000, half: float = 6.0, seed: int = 0) -> Points:
    """Points on the walls of a cube around the origin."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(-half, half, (count, 3))
    axis, sign = rng.integers(0, 3, count), rng.choice([-half, half], count)
    places[np.arange(count), axis] = sign
    return Points(places, rng)


def view(
    points: Points,
    camera_pose: np.ndarray,
    noise: float = 0.0,
    disparity_noise: float = 0.0,
    most: int = 600,
    rng: np.random.Generator | None = None,
) -> StereoFeatures:
    """What a camera with a pose sees: every point a stereo match and a track.

    Args:
        noise, disparity_noise: standard deviations, pixels; also given out as such.
        most: keypoints; each point has its rank, so that the same ones are kept.
    """
    seen = (points.places - camera_pose[:3, 3]) @ camera_pose[:3, :3]
    row = np.flatnonzero((seen[:, 2] > NEAREST) & (seen[:, 2] < FARTHEST))
    c = CAMERA
    xy = seen[row, :2] / seen[row, 2:] * (c.fx, c.fy) + (c.cx, c.cy)
    inside = ((xy > 4) & (xy < (WIDTH - 4, HEIGHT - 4))).all(1)
    row, xy = row[inside][:most], xy[inside][:most]
    disparity = c.fx * c.baseline / seen[row, 2]
    if rng is not None:
        xy = xy + rng.normal(0, noise, xy.shape)
        disparity = disparity + rng.normal(0, disparity_noise, len(row))
    return features(xy, disparity, points.ids[row], points.descriptors[row], noise, disparity_noise)


def features(
    xy: np.ndarray,
    disparity: np.ndarray,
    ids: np.ndarray,
    descriptors: np.ndarray,
    sigma: float = np.nan,
    disparity_sigma: float = np.nan,
) -> StereoFeatures:
    """Features of a pair in which every left keypoint has a match."""
    count = len(xy)
    ones, lengths = np.ones(count, np.float32), np.ones(count, np.uint16)
    left, right = (
        Features(np.float32(place), ones, descriptors, ids.astype(np.uint32), lengths, ones * sigma)
        for place in (xy, xy - np.column_stack([disparity, 0 * disparity]))
    )
    index = np.arange(count, dtype=np.uint32)
    return StereoFeatures(
        WIDTH, HEIGHT, left, right, index, index, np.float32(disparity),
        np.float32(ones * disparity_sigma), ones, ones, CAMERA.points(xy, disparity), 0.0, CAMERA,
    )  # fmt: skip


def off(estimate: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Metres and radians between two poses."""
    left = np.linalg.inv(truth) @ estimate
    return float(np.linalg.norm(left[:3, 3])), float(Rotation.from_matrix(left[:3, :3]).magnitude())
