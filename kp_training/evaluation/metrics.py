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
- `stereo_accuracy`: share of the matches that the front end publishes, of those whose left keypoint
  has ground truth, with |d - d_gt| <= 3 px, d being the published (refined) disparity;
  `stereo_matches` all published ones, `stereo_correct_matches` the right ones, `stereo_error_px`
  their median |d - d_gt|. Their rows are within 2 px by the front end's own limit.
- `inference_ms`: detection and description of one image.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from kp_frontend.frontend import StereoFeatures
from kp_training.evaluation.scenes import Scene

ROW_TOLERANCE = 2.0  # rows of a right match differ by no more, pixels
DISPARITY_TOLERANCE = 3.0  # disparity of a right match is off by no more, pixels

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


def at_pixels(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Values of an image (H, W) at the pixels nearest to points (N, 2), (N,)."""
    height, width = image.shape
    column, row = np.rint(xy).astype(int).T
    return image[row.clip(0, height - 1), column.clip(0, width - 1)]


def stereo_metrics(
    left_xy: np.ndarray, disparity: np.ndarray, truth: np.ndarray
) -> dict[str, float | int | None]:
    """Metrics of stereo matches with a disparity each: `stereo_*`, see above.

    Args:
        left_xy: (M, 2) places of the matches in the left image.
        disparity: (M,) of the matches, pixels.
        truth: (H, W) true disparity of the left image, NaN where unknown.
    """
    error = np.abs(disparity - at_pixels(truth, left_xy))
    correct = error <= DISPARITY_TOLERANCE
    return {
        "stereo_accuracy": _share(correct[np.isfinite(error)]),
        "stereo_matches": len(disparity),
        "stereo_correct_matches": int(correct.sum()),
        "stereo_error_px": float(np.median(error[correct])) if correct.any() else None,
    }


def published_metrics(features: StereoFeatures, truth: np.ndarray) -> dict[str, float | int | None]:
    """`stereo_metrics` of what the front end publishes about a pair.

    Args:
        truth: (H, W) true disparity of the left image, NaN where unknown.
    """
    left_xy = features.left.keypoints[features.left_index]
    return stereo_metrics(left_xy, features.disparity, truth)


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
