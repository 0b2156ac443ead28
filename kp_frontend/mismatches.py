"""Detects few or wrong stereo matches and finds the cause."""

from __future__ import annotations

import math

import cv2
import numpy as np

from kp_frontend.calibration import Camera
from kp_frontend.features import StereoFeatures

FEW_MATCHES, FEW_MATCHES_SHARE = 25, 0.04  # minimum number of matches, and share of the keypoints
# If fewer than DOUBTED_SHARE of the keypoints match, the matches are checked. They are doubtful if
# a share below AGREE has a disparity similar to their neighbours, or if the median cosine
# similarity is below ALIKE. On Middlebury, wrong pairs have shares up to 0.15. Correct pairs agree,
# also dim or noisy ones.
DOUBTED_SHARE, AGREE, ALIKE = 0.15, 0.65, 0.7
NEIGHBOURS, LIKE_NEIGHBOURS = 6, (3.0, 0.1)  # pixels, share of the disparity
MOST_COMPARED = 1024  # maximum number of keypoints per image used to find the cause
SIMILAR = 0.6  # minimum cosine similarity
SAME_ROW = 2.0  # pixels
LEAST_TELLING = 0.3  # pixels; minimum row difference of raw images for a match to count
SWAPPED = 2  # minimum ratio of matches with negative disparity to those with positive disparity
USUAL_SHARE = 0.4  # minimum share of matched keypoints in good pairs of Middlebury
CONSENSUS, CONSENSUS_SHARE = 30, 0.3  # minimum number, and share, of matches that agree


def doubtful(result: StereoFeatures) -> bool:
    """Whether there are almost no matches, or few that disagree, so that most are wrong."""
    keypoints = min(len(result.left), len(result.right))
    count = len(result)
    if count < max(FEW_MATCHES, FEW_MATCHES_SHARE * keypoints):
        return True
    if count >= DOUBTED_SHARE * keypoints:
        return False
    if np.median(result.similarity) < ALIKE:
        return True
    place, disparity = result.left.keypoints[result.left_index], result.disparity
    apart = np.square(place[:, None] - place).sum(-1)
    np.fill_diagonal(apart, np.inf)
    near = np.argpartition(apart, NEIGHBOURS, 1)[:, :NEIGHBOURS]
    usual = np.median(disparity[near], 1)
    pixels, share = LIKE_NEIGHBOURS
    like = np.abs(disparity - usual) <= np.maximum(pixels, share * np.abs(usual))
    return bool(like.mean() < AGREE)


def why_unmatched(
    result: StereoFeatures, depths: tuple[float, float] = (0.0, math.inf)
) -> tuple[str, str]:
    """The most likely cause of few matches between images with many keypoints, and a message.

    Descriptors are matched again without the limits of a rectified pair. The positions of these
    matches show the cause.

    Args:
        depths: minimum and maximum depth of the disparity search, metres.
    """
    left, right = _loose_matches(result)
    rows = right[:, 1] - left[:, 1]
    infinity = result.calibration.offset if result.calibration else 0.0
    disparity = (left[:, 0] - right[:, 0] - infinity)[np.abs(rows) <= SAME_ROW]
    ahead, behind = int((disparity > 1).sum()), int((disparity < -1).sum())
    if behind >= max(CONSENSUS, SWAPPED * ahead):
        return "swapped", "left and right are swapped: many keypoints match the other way round"
    if ahead >= max(CONSENSUS, SWAPPED * behind):
        return _refused(result, float(np.median(disparity[disparity > 1])), depths)
    enough = max(CONSENSUS, CONSENSUS_SHARE * len(rows))
    if len(rows):
        agree = np.abs(rows[:, None] - rows) <= SAME_ROW
        usual = int(agree.sum(1).argmax())
        if abs(rows[usual]) > SAME_ROW and agree[usual].sum() >= enough:
            return (
                "rows apart",
                f"the right image's rows are about {rows[usual]:+.0f} px off the left's: the "
                "images are not rectified, or the calibration is of another rig",
            )
    if len(rows) >= CONSENSUS:
        inside = cv2.findFundamentalMat(left, right, cv2.USAC_DEFAULT, 1.0, 0.99, 500)[1]
        if inside is not None and inside.sum() >= enough:
            return (
                "not rectified",
                "the images show the same scene, but not along the same rows: they are not "
                "rectified, or the calibration is of another rig",
            )
    return (
        "another scene",
        "the images are not rectified, or do not show the same scene (one turned or mirrored, "
        "cameras that do not look the same way, or images of different moments)",
    )


def _loose_matches(result: StereoFeatures) -> tuple[np.ndarray, np.ndarray]:
    """Positions (M, 2) in both images of similar mutual nearest neighbours, without other limits.

    Only the strongest keypoints are used.
    """
    left, right = (side.descriptors[:MOST_COMPARED] for side in (result.left, result.right))
    similarity = left @ right.T
    partner = similarity.argmax(1)
    mutual = similarity.argmax(0)[partner] == np.arange(len(partner))
    good = np.flatnonzero(mutual & (similarity.max(1) >= SIMILAR))
    return result.left.keypoints[good], result.right.keypoints[partner[good]]


def _refused(
    result: StereoFeatures, parallax: float, depths: tuple[float, float]
) -> tuple[str, str]:
    """Why matches along the rows are rejected; `parallax` is their median disparity, pixels."""
    calibration = result.calibration
    if calibration is not None:
        depth = calibration.fx * calibration.baseline / parallax
        if not depths[0] <= depth <= depths[1]:
            return (
                "depth limits",
                f"many keypoints match with disparities around "
                f"{parallax + calibration.offset:.0f} px, which is a depth of {depth:.3g} m by "
                "camera_info, outside min_depth to max_depth",
            )
    return (
        "poor images",
        "the images are noisy, blurred or dim, so that few keypoints look alike in both",
    )


def row_evidence(
    result: StereoFeatures, cameras: tuple[Camera, Camera]
) -> tuple[np.ndarray, np.ndarray]:
    """Compare the row differences of matches with those expected of raw images.

    Only matches with an expected difference above the noise and below the limit of the matching
    are used. Tracked matches are not: they were searched at equal rows.

    Returns:
        Row differences (right minus left) and expected row differences, pixels, (N,) each.
    """
    new = result.left.track_lengths[result.left_index] <= 1
    left = result.left.keypoints[result.left_index[new]]
    right = result.right.keypoints[result.right_index[new]]
    differ = right[:, 1] - left[:, 1]
    expected = differ - (cameras[1].rectify(right)[:, 1] - cameras[0].rectify(left)[:, 1])
    size = np.abs(expected)
    telling = (size > LEAST_TELLING) & (size < SAME_ROW)  # False for NaN
    return differ[telling], expected[telling]


def slope(values: np.ndarray, of: np.ndarray) -> float:
    """Fit values (N,) = slope * of (N,) by least absolute deviations, and return the slope."""
    ratios, weights = values / of, np.abs(of)
    order = np.argsort(ratios)
    total = np.cumsum(weights[order])
    return float(ratios[order][np.searchsorted(total, total[-1] / 2)])
