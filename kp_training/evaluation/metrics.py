"""Metrics: how well a method's keypoints repeat and match, against ground truth.

Definitions (for each scene; N keypoints at most per image; mutual nearest neighbours over
descriptors without epipolar help):

- `matching_accuracy`: share of matches with |y_l - y_r| <= 2 px; `total_matches`.
- `disparity_accuracy`: share of the matches whose left keypoint has ground truth with
  |y_l - y_r| <= 2 px and |x_l - x_r - d_gt| <= 3 px; `correct_matches` their number,
  `disparity_error_px` their median |x_l - x_r - d_gt|.
- `repeatability`, `repeatability_1px`: share of left keypoints, whose true place lies in the right
  image, with a right keypoint within 3 px (1 px) of it.
- `descriptor_map`: area under the precision-recall curve of the nearest-neighbour matches ranked
  by descriptor distance (DeTone et al., 2018); recall counts the left keypoints with a right
  keypoint within 3 px of their true place.
- `inference_ms`: detection and description of one image.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from kp_training.evaluation.scenes import Scene

METRICS = (
    "matching_accuracy",
    "total_matches",
    "disparity_accuracy",
    "correct_matches",
    "disparity_error_px",
    "repeatability",
    "repeatability_1px",
    "descriptor_map",
)


def _share(right: np.ndarray) -> float:
    """Share of what is right, (N,) bool; 0 of nothing, for nothing was found."""
    return float(right.mean()) if right.size else 0.0


def scene_metrics(scene: Scene, left: tuple, right: tuple) -> dict[str, float | None]:
    """Metrics of one scene from both images' (keypoints, descriptors).

    Shares of nothing are 0; the disparity error of no correct match is None.
    """
    (left_xy, left_descriptors), (right_xy, right_descriptors) = left, right
    if not len(left_xy) or not len(right_xy):
        counts = dict.fromkeys(("total_matches", "correct_matches"), 0)
        return dict.fromkeys(METRICS, 0.0) | counts | {"disparity_error_px": None}
    distance = cdist(left_descriptors, right_descriptors, "sqeuclidean")
    nearest = distance.argmin(1)
    mutual = distance.argmin(0)[nearest] == np.arange(len(left_xy))

    height, width = scene.disparity.shape
    column, row = np.rint(left_xy).astype(int).T
    truth = scene.disparity[row.clip(0, height - 1), column.clip(0, width - 1)]
    known = np.isfinite(truth)
    matched = right_xy[nearest]
    rows_apart = np.abs(left_xy[:, 1] - matched[:, 1])
    error = np.abs(left_xy[:, 0] - matched[:, 0] - truth)
    right_one = known & (rows_apart <= 2) & (error <= 3)

    place = left_xy - np.column_stack([truth, np.zeros(len(truth))])
    visible = known & (place[:, 0] >= 0)
    apart, _ = cKDTree(right_xy).query(place[visible])
    ranked = np.flatnonzero(known)[np.argsort(distance[known, nearest[known]], kind="stable")]
    return {
        "matching_accuracy": _share(rows_apart[mutual] <= 2),
        "total_matches": int(mutual.sum()),
        "disparity_accuracy": _share(right_one[mutual & known]),
        "correct_matches": int((right_one & mutual).sum()),
        "disparity_error_px": (
            float(np.median(error[right_one & mutual])) if (right_one & mutual).any() else None
        ),
        "repeatability": _share(apart <= 3),
        "repeatability_1px": _share(apart <= 1),
        "descriptor_map": average_precision(right_one[ranked], int((apart <= 3).sum())),
    }


def average_precision(correct: np.ndarray, possible: int) -> float:
    """Area under the precision-recall curve of matches in ranked order.

    Args:
        correct: (N,) bool, best match first.
        possible: number of correct matches that there could be.
    """
    if not correct.any():
        return 0.0
    hits = np.cumsum(correct)
    precision = hits / np.arange(1, len(correct) + 1)
    return float(precision[correct].sum() / max(possible, hits[-1]))
