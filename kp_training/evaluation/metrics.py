"""Metrics of keypoints and matches against ground truth disparity.

docs/evaluation.md defines them with formulas. In short, for a scene with at most N keypoints per
image and mutual nearest neighbours without an epipolar constraint (or the method's own matcher):

- `total_matches`; `matching_accuracy`: share of them with |y_l - y_r| <= 2 px.
- `correct_matches`: matches with |y_l - y_r| <= 2 px and |x_l - x_r - d_gt| <= 3 px;
  `disparity_accuracy`: their share among the matches with ground truth at the left keypoint;
  `disparity_error_px`: their median |x_l - x_r - d_gt|.
- `repeatability`, `repeatability_1px`: share of the keypoints with a true position inside the other
  image that have a keypoint of the other image within 3 px (1 px). `..._unoccluded`: only of
  keypoints that are visible in the other image.
- `descriptor_map`: area under the precision-recall curve of the nearest-neighbour matches ranked
  by descriptor distance (DeTone et al., 2018); None for a method with its own matcher.
- `inference_ms`: detection and description of one image.

- `score_auc`: how well the rank of the weaker keypoint of a match, in the order of scores, tells
  correct matches from wrong ones (area under the ROC curve). `disparity_accuracy_256` and
  `correct_matches_256`: of the matches among the 256 strongest keypoints of each image.

Repeatability and mAP are averaged over both directions where both images have a map. For the
matches that the front end publishes, with its epipolar limits and refined disparity d:

- `stereo_matches`; `stereo_correct_matches`: number of them with |d - d_gt| <= 3 px;
  `stereo_accuracy`: their share among the matches with ground truth; `stereo_error_px`: their
  median |d - d_gt|. The front end limits the difference of their rows to 2 px.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from kp_frontend.features import StereoFeatures
from kp_training.evaluation.scenes import Scene, View, left_view, right_view

ROW_TOLERANCE = 2.0  # maximum row difference of a correct match, pixels
DISPARITY_TOLERANCE = 3.0  # maximum disparity error of a correct match, pixels
REPEAT_TOLERANCE = 3.0  # maximum distance of a repeated keypoint from its true position, pixels

MATCHES = (
    "matching_accuracy",
    "total_matches",
    "disparity_accuracy",
    "correct_matches",
    "disparity_error_px",
)
KEYPOINTS = (
    "repeatability",
    "repeatability_1px",
    "repeatability_unoccluded",
    "repeatability_unoccluded_1px",
    "descriptor_map",
)
UNCONSTRAINED = (*MATCHES, *KEYPOINTS)
STEREO = ("stereo_accuracy", "stereo_matches", "stereo_correct_matches", "stereo_error_px")
SIGMA = ("sigma_ratio", "sigma_within_2")
CONFIDENCE = ("confidence_auc", "confidence_error")
TRUST = (*SIGMA, *CONFIDENCE)
STRONGEST = 256  # keypoints
SCORES = ("score_auc", "disparity_accuracy_256", "correct_matches_256")
METRICS = (*UNCONSTRAINED, *SCORES, *STEREO, *TRUST, "inference_ms")
LESS_IS_BETTER = ("disparity_error_px", "stereo_error_px", "confidence_error", "inference_ms")

Value = float | int | None


def squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (N, M) of descriptors (N, D) and (M, D), float32."""
    if not len(left) or not len(right):  # without keypoints the descriptor length is unknown
        return np.zeros((len(left), len(right)), np.float32)
    left, right = left.astype(np.float32), right.astype(np.float32)
    squares = np.square(left).sum(1)[:, None] + np.square(right).sum(1)
    return np.maximum(squares - 2 * left @ right.T, 0)


def mutual_nearest(distance: np.ndarray) -> np.ndarray:
    """Mutual nearest neighbours for distances (N, L), as (M, 2) indices."""
    if not distance.size:
        return np.zeros((0, 2), int)
    nearest = distance.argmin(1)
    rows = np.flatnonzero(distance.argmin(0)[nearest] == np.arange(len(distance)))
    return np.column_stack([rows, nearest[rows]])


def share(right: np.ndarray) -> float:
    """Share of True in (N,) bool; 0 for an empty array, because nothing was found."""
    return float(right.mean()) if right.size else 0.0


def median(errors: np.ndarray) -> float | None:
    """Median of errors; None for an empty array."""
    return float(np.median(errors)) if errors.size else None


def at_pixels(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Values (N,) of an image (H, W) at the pixels nearest to points (N, 2)."""
    height, width = image.shape
    column, row = np.rint(xy).astype(int).T
    return image[row.clip(0, height - 1), column.clip(0, width - 1)]


def stereo_metrics(
    left_xy: np.ndarray, disparity: np.ndarray, truth: np.ndarray
) -> dict[str, Value]:
    """Metrics of stereo matches with a disparity each: the `stereo_*` metrics above.

    Args:
        left_xy: (M, 2) positions of the matches in the left image.
        disparity: (M,) of the matches, pixels.
        truth: (H, W) true disparity of the left image, NaN where unknown.
    """
    error = np.abs(disparity - at_pixels(truth, left_xy))
    correct = error <= DISPARITY_TOLERANCE
    return {
        "stereo_accuracy": share(correct[np.isfinite(error)]),
        "stereo_matches": len(disparity),
        "stereo_correct_matches": int(correct.sum()),
        "stereo_error_px": median(error[correct]),
    }


def published_metrics(features: StereoFeatures, truth: np.ndarray) -> dict[str, Value]:
    """`stereo_metrics` of the matches that the front end publishes for a pair.

    Args:
        truth: (H, W) true disparity of the left image, NaN where unknown.
    """
    left_xy = features.left.keypoints[features.left_index]
    return stereo_metrics(left_xy, features.disparity, truth)


def match_errors(
    truth: np.ndarray, left_xy: np.ndarray, right_xy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Errors of matches (M,): row difference, and x_l - x_r - d_gt (NaN without ground truth)."""
    apart = left_xy - right_xy
    return np.abs(apart[:, 1]), apart[:, 0] - at_pixels(truth, left_xy)


def is_correct(rows_apart: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Which matches are correct by ground truth, (M,) bool."""
    return (rows_apart <= ROW_TOLERANCE) & (np.abs(error) <= DISPARITY_TOLERANCE)


def match_metrics(scene: Scene, left_xy: np.ndarray, right_xy: np.ndarray) -> dict[str, Value]:
    """Metrics of unconstrained matches, (M, 2) positions in the left and the right image."""
    rows_apart, error = match_errors(scene.disparity, left_xy, right_xy)
    correct = is_correct(rows_apart, error)
    return {
        "matching_accuracy": share(rows_apart <= ROW_TOLERANCE),
        "total_matches": len(left_xy),
        "disparity_accuracy": share(correct[np.isfinite(error)]),
        "correct_matches": int(correct.sum()),
        "disparity_error_px": median(np.abs(error[correct])),
    }


def direction_metrics(
    view: View, xy: np.ndarray, other_xy: np.ndarray, distance: np.ndarray
) -> dict[str, float]:
    """Repeatability and mAP from one image to the other.

    Args:
        view: ground truth of the image.
        xy, other_xy: (N, 2) and (L, 2) keypoints of the image and of the other one.
        distance: (N, L) squared distances of their descriptors.
    """
    place = xy + np.column_stack([at_pixels(view.shift, xy), np.zeros(len(xy))])
    known = np.isfinite(place[:, 0])
    inside = known & (place[:, 0] >= 0) & (place[:, 0] <= view.shift.shape[1] - 1)
    apart = np.full(len(xy), np.inf)
    apart[inside], _ = cKDTree(other_xy).query(place[inside])
    seen = inside & at_pixels(view.visible, xy)

    nearest = distance.argmin(1)
    matched = other_xy[nearest]
    right_one = is_correct(np.abs(xy[:, 1] - matched[:, 1]), matched[:, 0] - place[:, 0])
    order = np.argsort(distance[known, nearest[known]], kind="stable")
    possible = int((apart <= REPEAT_TOLERANCE).sum())
    return {
        "repeatability": share(apart[inside] <= REPEAT_TOLERANCE),
        "repeatability_1px": share(apart[inside] <= 1),
        "repeatability_unoccluded": share(apart[seen] <= REPEAT_TOLERANCE),
        "repeatability_unoccluded_1px": share(apart[seen] <= 1),
        "descriptor_map": average_precision(right_one[known][order], possible),
    }


def scene_metrics(
    scene: Scene,
    left: tuple[np.ndarray, np.ndarray],
    right: tuple[np.ndarray, np.ndarray],
    matches: np.ndarray | None = None,
) -> dict[str, Value]:
    """Unconstrained metrics of one scene, from (keypoints, descriptors) of both images.

    Shares of an empty set are 0. The disparity error without a correct match is None.

    Args:
        matches: (M, 2) indices from the method's own matcher, without mAP; None uses mutual nearest
            neighbours.
    """
    (left_xy, left_descriptors), (right_xy, right_descriptors) = left, right
    if not len(left_xy) or not len(right_xy):
        counts = {"total_matches": 0, "correct_matches": 0, "disparity_error_px": None}
        found = dict.fromkeys(UNCONSTRAINED, 0.0) | counts
    else:
        distance = squared_distances(left_descriptors, right_descriptors)
        rows = mutual_nearest(distance) if matches is None else matches
        found = match_metrics(scene, left_xy[rows[:, 0]], right_xy[rows[:, 1]])
        ways = [direction_metrics(left_view(scene), left_xy, right_xy, distance)]
        back = right_view(scene)
        if back is not None:
            ways.append(direction_metrics(back, right_xy, left_xy, distance.T))
        found |= {name: float(np.mean([way[name] for way in ways])) for name in ways[0]}
    if matches is not None:
        found["descriptor_map"] = None
    return found


def average_precision(correct: np.ndarray, possible: int) -> float:
    """Area under the precision-recall curve of matches in ranked order.

    Args:
        correct: (N,) bool, best match first.
        possible: number of keypoints that have a correct match.
    """
    if not correct.any():
        return 0.0
    hits = np.cumsum(correct)
    precision = hits / np.arange(1, len(correct) + 1)
    return float(precision[correct].sum() / max(possible, hits[-1]))
