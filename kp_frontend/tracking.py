"""Tracks: the same point in consecutive pairs.

The pipeline finds the points of earlier frames again (see `recovery`). The tracker assigns their
ids, ends tracks that contradict the motion of the camera, stores lost points for some frames, and
predicts the position of each point in the next frame.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.spatial import cKDTree

from kp_frontend.calibration import StereoCalibration
from kp_frontend.motion import Motion, off_epipolar, project, rigid_motion
from kp_frontend.pipeline import PipelineResults, TrackResults
from kp_frontend.recovery import known_rows
from kp_frontend.registration import PATCH_SIDE

MOST_IDS = 2**32 - 1  # then ids start again from 1; 0 means no track
LONGEST = 2**16 - 1  # what a track's length can be in a message
LOST_FRAMES = 4  # for which a lost point is remembered
WORTH = 2  # length from which a lost track is remembered
CHANCE = 0.05  # share of the known points that is found even in another scene
NEIGHBOURS = 5  # number of neighbours whose median disparity a point without one gets
GROWTH = 2.0  # most by which the scale is expected to change from frame to frame, as a factor


@dataclass(frozen=True)
class Points:
    """Points with a track, N rows.

    `ids` uint32, `lengths` uint16; `lost` frames since the point was seen; `xy` (N, 2) position in
    the left image and `places` (N, 2) in the rectified one, where it was seen last or, of lost
    points, expected; `offset` (N, 2) from there to the position in the right image, NaN where
    unknown; `disparity` in rectified pixels, NaN where unknown; `stored` windows of the image by
    which the points are found again, and `scale`, how large the windows are; `step` (N, 2) and
    `growth`, the motion and the change of scale that are expected until the next frame.
    """

    ids: np.ndarray
    lengths: np.ndarray
    lost: np.ndarray
    xy: np.ndarray
    places: np.ndarray
    offset: np.ndarray
    disparity: np.ndarray
    descriptors: np.ndarray
    stored: np.ndarray
    scale: np.ndarray
    step: np.ndarray
    growth: np.ndarray

    @classmethod
    def none(cls, dim: int) -> Points:
        """No point."""
        flat, pair = np.zeros(0, np.float32), np.zeros((0, 2), np.float32)
        stored = np.zeros((0, PATCH_SIDE, PATCH_SIDE), np.float32)
        ids, lengths, lost = (np.zeros(0, kind) for kind in (np.uint32, np.uint16, np.int64))
        described = np.zeros((0, dim), np.float32)
        return cls(ids, lengths, lost, pair, pair, pair, flat, described, stored, flat, pair, flat)

    def rows(self, which: np.ndarray) -> Points:
        """Some of the rows, in this order. All arrays are copies."""
        return Points(*(getattr(self, f.name)[which] for f in fields(self)))

    def and_then(self, others: Points) -> Points:
        """These points and others."""
        pairs = ((getattr(self, f.name), getattr(others, f.name)) for f in fields(self))
        return Points(*(np.concatenate(pair) for pair in pairs))

    def as_expected(self) -> Points:
        """The points where they are expected in the next frame."""
        change = self.disparity * (self.growth - 1)
        return replace(
            self,
            xy=self.xy + self.step,
            places=self.places + self.step,
            offset=self.offset - np.column_stack([change, np.zeros_like(change)]),
            disparity=self.disparity + change,
            scale=self.scale * self.growth,
        )


class Tracker:
    """Gives each left keypoint the track of the known point that it is, or a new one.

    `known` are the arrays of `recovery.Known` for the next pair.

    Args:
        count: keypoints per image.
        dim: values in each descriptor.
    """

    def __init__(self, count: int, dim: int) -> None:
        self._count, self._dim = count, dim
        self._next_id = 1
        self.reset()

    def reset(self) -> None:
        """Forget all points: every keypoint of the next pair starts a new track."""
        self._points = Points.none(self._dim)
        self._motion: Motion | None = None
        self.known = self.nothing_known()

    def nothing_known(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arrays of `recovery.Known` without any point."""
        total = known_rows(self._count)
        return (
            np.zeros((total, 8), np.float32),
            np.zeros((total, self._dim), np.float32),
            np.zeros((total, PATCH_SIDE, PATCH_SIDE), np.float32),
        )

    def update(
        self,
        results: PipelineResults,
        tracks: TrackResults,
        calibration: StereoCalibration | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Go on to the next pair.

        Returns:
            Track ids (K,) uint32 and lengths (K,) uint16 of the left rows, 0 where there is no
            keypoint. They are the caller's to change.
        """
        row = tracks.known_row
        ended = self._contradicting(row, results.places[0], calibration)
        ids, lengths = np.zeros(len(row), np.uint32), np.zeros(len(row), np.uint16)
        old = (row >= 0) & ~ended
        ids[old] = self._points.ids[row[old]]
        lengths[old] = np.minimum(self._points.lengths[row[old]], LONGEST - 1) + 1
        new = np.flatnonzero(~old & (results.scores[0] > 0))
        ids[new] = (self._next_id - 1 + np.arange(len(new), dtype=np.uint64)) % MOST_IDS + 1
        lengths[new] = 1
        self._next_id = (self._next_id - 1 + len(new)) % MOST_IDS + 1
        seen = self._seen(results, tracks, ids, lengths)
        room = known_rows(self._count) - len(seen.ids)
        points = seen.and_then(self._lost(tracks, room))
        longest_first = np.lexsort((points.lost, -points.lengths.astype(np.int64)))
        points = points.rows(longest_first)
        step, growth = self._expected(points, calibration)
        self._points = replace(points, step=step, growth=growth)
        self.known = self._known()
        return ids, lengths

    def _contradicting(
        self, row: np.ndarray, places: np.ndarray, calibration: StereoCalibration | None
    ) -> np.ndarray:
        """Which left rows (K,) contradict the motion of the camera, which is estimated here.

        After a cut to another scene a few points match by chance. So all tracks end if no more than
        that are found.

        Args:
            row: (K,) known row of each left row or -1.
            places: (K, 2) rectified pixels.
        """
        ended = np.zeros(len(row), bool)
        seen = np.flatnonzero(row >= 0)
        if len(seen) < CHANCE * len(self._points.ids):
            self._motion = None
            ended[seen] = True
            return ended
        seen = seen[self._points.lost[row[seen]] == 0]
        before = self._points.places[row[seen]]
        if calibration is None:
            self._motion = None
            ended[seen] = off_epipolar(before, places[seen])
            return ended
        points = calibration.points(before, self._points.disparity[row[seen]])
        deep = np.isfinite(points[:, 2])
        seen = seen[deep]
        self._motion, ended[seen] = rigid_motion(
            points[deep], places[seen], calibration, self._motion
        )
        return ended

    def _seen(
        self, results: PipelineResults, tracks: TrackResults, ids: np.ndarray, lengths: np.ndarray
    ) -> Points:
        """The points of this frame; their step is the one that they made."""
        n = int(np.count_nonzero(ids))  # valid rows come first
        row, right = tracks.known_row[:n], results.right_row[:n]
        xy, places = results.xy[0][:n], results.places[0][:n]
        matched = right >= 0
        step = np.zeros_like(places)
        step[row >= 0] = places[row >= 0] - self._points.places[row[row >= 0]]
        offset = np.where(matched[:, None], results.xy[1][right] - xy, np.float32(np.nan))
        disparity = np.where(matched, results.disparity[:n], np.float32(np.nan))
        lost, growth = np.zeros(n, np.int64), np.ones(n, np.float32)
        descriptors, stored, scale = results.descriptors[0], tracks.stored, tracks.scale
        return Points(
            ids[:n], lengths[:n], lost, xy, places, offset, disparity,
            descriptors[:n], stored[:n], scale[:n], step, growth,
        )  # fmt: skip

    def _lost(self, tracks: TrackResults, room: int) -> Points:
        """The points that were not found in this frame and are worth remembering.

        Args:
            room: number of points that can be remembered.
        """
        points = self._points
        missing = np.ones(len(points.ids), bool)
        missing[tracks.known_row[tracks.known_row >= 0]] = False
        missing &= (points.lost < LOST_FRAMES) & (points.lengths >= WORTH)
        kept = np.flatnonzero(missing)[:room]
        lost = points.rows(kept)
        step = tracks.expected[kept] - lost.xy
        return replace(replace(lost, step=step).as_expected(), lost=lost.lost + 1)

    def _expected(
        self, points: Points, calibration: StereoCalibration | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predict how points move until the next frame with the same camera motion.

        Returns:
            Steps (N, 2), pixels, and the factors (N,) by which they will be nearer.
        """
        step, growth = points.step.copy(), np.ones(len(points.ids), np.float32)
        known = np.isfinite(points.disparity)
        if calibration is None or self._motion is None or not known.any():
            return step, growth
        disparity = points.disparity.copy()
        if not known.all():
            tree = cKDTree(points.places[known])
            near = tree.query(points.places[~known], range(1, 1 + min(NEIGHBOURS, known.sum())))[1]
            disparity[~known] = np.median(disparity[known][near], axis=1)
        before = calibration.points(points.places, disparity)
        after = self._motion.apply(before)
        there = project(after, calibration)
        with np.errstate(invalid="ignore", divide="ignore"):
            nearer = before[:, 2] / after[:, 2]
        good = np.isfinite(there).all(1) & (nearer > 1 / GROWTH) & (nearer < GROWTH)
        step[good], growth[good] = (there - points.places)[good], nearer[good]
        return step, growth

    def _known(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arrays of `recovery.Known` for the next pair."""
        rows, descriptors, stored = self.nothing_known()
        points, next_time = self._points, self._points.as_expected()
        n = len(points.ids)
        rows[:n, :2], rows[:n, 2:4] = points.xy, next_time.xy
        rows[:n, 4:6] = np.nan_to_num(next_time.offset)
        rows[:n, 6] = next_time.scale
        rows[:n, 7] = np.where(np.isfinite(next_time.offset[:, 0]), 2, 1)
        descriptors[:n], stored[:n] = points.descriptors, points.stored
        return rows, descriptors, stored
