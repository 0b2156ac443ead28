"""The usable points of a stereo pair, and their matches to the points of another pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kp_frontend.calibration import StereoCalibration
from kp_frontend.features import StereoFeatures
from kp_frontend.odometry.config import OdometryConfig

FINEST, COARSEST = 0.1, 100.0  # pixels; limits of a standard deviation


@dataclass
class Observations:
    """Points of one pair, one row per point.

    `points` (N, 3) metres in the left rectified optical frame, `pixels` (N, 2) their projections in
    the left rectified image, `disparity` (N,) pixels with infinity at 0, corrected by `offset`
    (pixels) as the points are, `sigma` and
    `disparity_sigma` (N,) pixels, `tracks` (N,) int64 track ids of the front end, 0 for none,
    `descriptors` (N, D) unit vectors, `ids` (N,) int64 ids of the odometry, -1 until assigned.
    """

    points: np.ndarray
    pixels: np.ndarray
    disparity: np.ndarray
    sigma: np.ndarray
    disparity_sigma: np.ndarray
    tracks: np.ndarray
    descriptors: np.ndarray
    ids: np.ndarray
    offset: float = 0.0

    def __len__(self) -> int:
        return len(self.points)


def observe(
    features: StereoFeatures,
    camera: StereoCalibration,
    config: OdometryConfig,
    offset: float = 0.0,
) -> tuple[Observations, dict[str, int]]:
    """Select the usable points of a pair.

    Pixels are computed from the points, because keypoints of raw images are not rectified.

    Args:
        offset: constant error of the disparities, pixels.

    Returns:
        The observations, and the number of skipped or changed matches by reason.
    """
    given = np.asarray(features.points, np.float64).reshape(-1, 3)
    good: np.ndarray = np.isfinite(given).all(1) & (given[:, 2] > 0)
    disparity = np.zeros(len(given))
    disparity[good] = camera.fx * camera.baseline / given[good, 2] - offset
    good &= disparity > 0
    row, points = np.asarray(features.left_index, np.int64)[good], given[good]
    disparity = disparity[good]
    points *= (camera.fx * camera.baseline / disparity / points[:, 2])[:, None]
    x, y, z = points.T
    pixels = np.column_stack([x / z * camera.fx + camera.cx, y / z * camera.fy + camera.cy])
    tracks = features.left.track_ids[row].astype(np.int64)
    repeated = _repeated(tracks)
    tracks[repeated] = 0
    found = Observations(
        points,
        pixels,
        disparity,
        _known(features.left.sigma[row], config.position_sigma),
        _known(features.disparity_sigma[good], config.disparity_sigma),
        tracks,
        features.left.descriptors[row],
        np.full(len(points), -1, np.int64),
        offset,
    )
    return found, {"without depth": int((~good).sum()), "repeated track id": int(repeated.sum())}


def _repeated(tracks: np.ndarray) -> np.ndarray:
    """Mask (N,) of the rows with a track id that occurs more than once."""
    _, inverse, count = np.unique(tracks, return_inverse=True, return_counts=True)
    return (count[inverse] > 1) & (tracks != 0)


def _known(sigma: np.ndarray, fallback: float) -> np.ndarray:
    """Standard deviations (N,) float64, with a fallback for unknown ones."""
    sigma = np.asarray(sigma, np.float64)
    known = np.where(np.isfinite(sigma) & (sigma > 0), sigma, fallback)
    return np.clip(known, FINEST, COARSEST)


def link(
    before: Observations, now: Observations, width: int, config: OdometryConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Match the points of two pairs by track id, and by descriptor without a common track.

    Descriptors help if a pair was lost in between, and with near points, which move farther than
    the front end tracks them.

    Returns:
        Rows in `before` and rows in `now`, (M,) int64 each; no row occurs twice.
    """
    _, a, b = np.intersect1d(before.tracks, now.tracks, return_indices=True)
    tracked = before.tracks[a] != 0
    a, b = a[tracked], b[tracked]
    if config.link_similarity >= 1:
        return a, b
    left = np.setdiff1d(np.arange(len(before)), a)
    right = np.setdiff1d(np.arange(len(now)), b)
    # Another network may have descriptors of another length.
    same_kind = before.descriptors.shape[1] == now.descriptors.shape[1]
    if not len(left) or not len(right) or not same_kind:
        return a, b
    similarity = before.descriptors[left] @ now.descriptors[right].T
    for axis in range(2):
        a_place, b_place = (
            side.pixels[rows, axis].astype(np.float32)
            for side, rows in ((before, left), (now, right))
        )
        similarity[np.abs(a_place[:, None] - b_place) > config.link_reach * width] = -2
    best, back = similarity.argmax(1), similarity.argmax(0)
    rows = np.arange(len(left))
    good = (back[best] == rows) & (similarity[rows, best] >= config.link_similarity)
    return np.concatenate([a, left[good]]), np.concatenate([b, right[best[good]]])
