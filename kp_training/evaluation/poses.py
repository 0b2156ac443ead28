"""True poses, interpolated at the time stamps of images."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

NEIGHBOURS_NS = 100_000_000  # maximum distance of the poses before and after a time
NEAREST_NS = 5_000_000  # maximum distance of the nearest pose, where one side has no pose


class Poses:
    """Poses (4, 4) by time stamp in nanoseconds.

    Positions are interpolated linearly, rotations along the shortest path (slerp).
    """

    def __init__(self, poses: dict[int, np.ndarray]) -> None:
        self._stamps = np.array(sorted(poses), np.int64)
        self._poses = poses

    def __len__(self) -> int:
        return len(self._stamps)

    def at(self, stamp: int) -> np.ndarray | None:
        """The pose (4, 4) at a time; None if no pose is near enough."""
        if stamp in self._poses:
            return self._poses[stamp]
        if not len(self._stamps):
            return None
        place = int(np.searchsorted(self._stamps, stamp))
        after = int(self._stamps[min(place, len(self._stamps) - 1)])
        before = int(self._stamps[max(place - 1, 0)])
        nearest = min(before, after, key=lambda other: abs(other - stamp))
        if before < stamp < after and max(stamp - before, after - stamp) <= NEIGHBOURS_NS:
            return self._between(before, after, (stamp - before) / (after - before))
        return self._poses[nearest] if abs(nearest - stamp) <= NEAREST_NS else None

    def _between(self, before: int, after: int, share: float) -> np.ndarray:
        one, other = self._poses[before], self._poses[after]
        turns = Rotation.from_matrix(np.stack([one[:3, :3], other[:3, :3]]))
        pose = np.eye(4)
        pose[:3, :3] = Slerp([0.0, 1.0], turns)(share).as_matrix()
        pose[:3, 3] = (1 - share) * one[:3, 3] + share * other[:3, 3]
        return pose
