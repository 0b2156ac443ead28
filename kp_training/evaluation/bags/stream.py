"""What can be known of a stream of stereo features: with ground truth, and without it.

Each pair has metrics of its own, and metrics that compare it with the previous pair. They are
functions of the published `StereoFeatures` and of the images, so that they are the same whether the
features come from a call, from a recording or from a running node. `docs/bags.md` has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from kp_frontend.features import StereoFeatures
from kp_training.evaluation.metrics import (
    ROW_TOLERANCE,
    at_pixels,
    median,
    mutual_nearest,
    published_metrics,
    scene_metrics,
    share,
    squared_distances,
)
from kp_training.evaluation.optical_flow import follow
from kp_training.evaluation.scenes import Scene
from kp_training.evaluation.tracks import TrackMetrics, same_tracks
from kp_training.evaluation.trust import Trust

GRID = (16, 12)  # cells of the image, columns and rows, for coverage
NEIGHBOURS = 8  # matches that a match's disparity is compared with
OUTLIER_PX, OUTLIER_SHARE = 3.0, 0.05  # a disparity is off by more than both, as KITTI counts
NEAR = 3.0  # pixels; a keypoint is found again
FLOW_METRICS = ("temporal_repeatability", "temporal_repeatability_1px", "track_flow_accuracy")

Row = dict[str, float | int | None]


@dataclass(frozen=True)
class _Before:
    """Data of a pair that the next pair is compared with."""

    stamp: int
    camera: str
    features: StereoFeatures
    image: np.ndarray | None

    @property
    def rig(self) -> tuple[str, int, int]:
        """Key that two successive pairs must share to be compared."""
        return self.camera, self.features.width, self.features.height


class StreamMetrics:
    """Computes the metrics of successive pairs. Stores the previous pair.

    `previous` maps a pair's stamp to that of the pair its temporal metrics refer to, `row_errors`
    collects |y_r - y_l| of all unconstrained matches, for a histogram, `tracks` has the metrics of
    the whole stream's tracks.
    """

    def __init__(self) -> None:
        self._before: _Before | None = None
        self.previous: dict[int, int] = {}
        self.row_errors: list[np.ndarray] = []
        self.tracks = TrackMetrics()

    def add(
        self,
        stamp: int,
        camera: str,
        features: StereoFeatures,
        image: np.ndarray | None = None,
        truth: np.ndarray | None = None,
        pose: np.ndarray | None = None,
    ) -> Row:
        """Metrics of the next pair.

        Args:
            stamp: of the left image, nanoseconds.
            camera: its frame; a pair of another camera or size is no continuation.
            image: (H, W) uint8 left image; without it there is no optical flow.
            truth: (H, W) true disparity, NaN where unknown.
            pose: (4, 4) true pose of the left rectified camera in the world.
        """
        rows = unconstrained_rows(features)
        self.row_errors.append(np.abs(rows))
        row: Row = {
            "keypoints": len(features.left),
            "stereo_matches": len(features),
            **epipolar_metrics(rows),
            **match_metrics(features),
            **coverage_metrics(features),
        }
        before = self._before
        goes_on = before is not None and before.rig == (camera, features.width, features.height)
        row |= self.tracks.add(features, pose, goes_on)
        if before is not None and goes_on:
            self.previous[stamp] = before.stamp
            row |= track_metrics(before.features, features)
            if image is not None and before.image is not None:
                row |= flow_metrics(before.features, features, before.image, image)
        if truth is not None:
            row |= truth_metrics(features, truth)
        self._before = _Before(stamp, camera, features, image)
        return row


def _share(which: np.ndarray) -> float | None:
    """Share of True in (N,) bool; None for an empty array."""
    return share(which) if which.size else None


def unconstrained_rows(features: StereoFeatures) -> np.ndarray:
    """y_r - y_l of the mutual nearest neighbours over the descriptors alone, (M,) pixels."""
    left, right = features.left, features.right
    if not len(left) or not len(right):
        return np.zeros(0, np.float32)
    rows = mutual_nearest(squared_distances(left.descriptors, right.descriptors))
    return right.keypoints[rows[:, 1], 1] - left.keypoints[rows[:, 0], 1]


def epipolar_metrics(rows: np.ndarray) -> Row:
    """Of y_r - y_l (M,): how well matches keep to their row, which is the epipolar line."""
    error = np.abs(rows)
    return {
        "total_matches": len(rows),
        "matching_accuracy": share(error <= ROW_TOLERANCE),
        "epipolar_error_px": median(error),
        "epipolar_error_p90_px": float(np.percentile(error, 90)) if error.size else None,
        "row_offset_px": median(rows),
    }


def match_metrics(features: StereoFeatures) -> Row:
    """Share of left keypoints that are matched, and how smooth the disparities are.

    A match is compared with the median disparity of its `NEIGHBOURS` nearest matches.
    """
    row: Row = {
        "matched_share": len(features) / max(1, len(features.left)),
        "disparity_roughness_px": None,
        "disparity_outliers": None,
    }
    if len(features) > NEIGHBOURS:
        places = features.left.keypoints[features.left_index]
        _, near = cKDTree(places).query(places, NEIGHBOURS + 1)
        around = np.median(features.disparity[near[:, 1:]], axis=1)
        off = np.abs(features.disparity - around)
        row["disparity_roughness_px"] = median(off)
        outlier = (off > OUTLIER_PX) & (off > OUTLIER_SHARE * np.abs(around))
        row["disparity_outliers"] = _share(outlier)
    return row


def coverage_metrics(features: StereoFeatures) -> Row:
    """Share of the cells of a grid over the left image with a keypoint, and with a match."""
    columns, rows = GRID
    scale = np.array([columns / features.width, rows / features.height])
    cell = ((features.left.keypoints + 0.5) * scale).astype(int).clip(0, np.array(GRID) - 1)
    number = cell[:, 1] * columns + cell[:, 0]
    return {
        "keypoint_coverage": len(np.unique(number)) / (columns * rows),
        "match_coverage": len(np.unique(number[features.left_index])) / (columns * rows),
    }


def track_metrics(before: StereoFeatures, now: StereoFeatures) -> Row:
    """Shares of left keypoints, and of stereo matches, whose tracks continue."""
    ids = before.left.track_ids
    matched = ids[before.left_index]
    matched_now = now.left.track_ids[now.left_index]
    if not ids.any():  # no tracks are made
        return {"track_survival": None, "match_survival": None}
    return {
        "track_survival": _share(np.isin(ids, now.left.track_ids) & (ids > 0)),
        "match_survival": _share(np.isin(matched, matched_now) & (matched > 0)),
    }


def flow_metrics(
    before: StereoFeatures, now: StereoFeatures, image_before: np.ndarray, image: np.ndarray
) -> Row:
    """Share of keypoints that are detected again at the position predicted by optical flow.

    Pyramidal Lucas-Kanade (Bouguet, 2001) of the images is the judge, which knows nothing of the
    features; keypoints that it cannot follow there and back say nothing.
    """
    if not len(before.left):
        return dict.fromkeys(FLOW_METRICS)
    place, followed = follow(image_before, image, before.left.keypoints)
    apart = np.full(int(followed.sum()), np.inf)
    if len(now.left):
        apart, _ = cKDTree(now.left.keypoints).query(place[followed])
    old, new = same_tracks(before.left.track_ids, now.left.track_ids)
    off = np.linalg.norm(now.left.keypoints[new] - place[old], axis=1)[followed[old]]
    shares = (_share(apart <= NEAR), _share(apart <= 1.0), _share(off <= NEAR))
    return dict(zip(FLOW_METRICS, shares, strict=True))


def truth_metrics(features: StereoFeatures, truth: np.ndarray) -> Row:
    """The metrics of `kp evaluate middlebury` for published features, left to right.

    Those of unoccluded keypoints are left out: a bag does not say what is occluded. Disparity maps
    of bags count as sub-pixel.
    """
    blank = np.zeros(truth.shape, np.uint8)
    scene = Scene("", blank, blank, truth)
    left, right = features.left, features.right
    found = scene_metrics(
        scene, (left.keypoints, left.descriptors), (right.keypoints, right.descriptors)
    ) | published_metrics(features, truth)
    error = features.disparity - at_pixels(truth, left.keypoints[features.left_index])
    known = np.isfinite(error)
    sigma, confidence = features.disparity_sigma[known], features.confidence[known]
    found |= Trust(error[known], sigma, confidence, precise=True).metrics()
    return {name: value for name, value in found.items() if "unoccluded" not in name}
