"""Few or wrong stereo matches: are there, and why?"""

from __future__ import annotations

import math

import cv2
import numpy as np

from kp_frontend.calibration import Camera
from kp_frontend.features import StereoFeatures

FEW_MATCHES, FEW_MATCHES_SHARE = 25, 0.04  # fewer than the number, or the share of the keypoints
# Below this share of the keypoints matches are doubted: less of them than AGREE have a disparity
# like their neighbours, or the median cosine of their descriptors is less than ALIKE. On
# Middlebury wrong pairs have shares up to .15; right ones, also dim or noisy, agree.
DOUBTED_SHARE, AGREE, ALIKE = 0.15, 0.65, 0.7
NEIGHBOURS, LIKE_NEIGHBOURS = 6, (3.0, 0.1)  # pixels, share of the disparity
MOST_COMPARED = 1024  # keypoints of each image, to find out why there are few matches
SIMILAR = 0.6  # cosine of descriptors
SAME_ROW = 2.0  # pixels
SWAPPED = 2  # times as many matches with a negative disparity as with a positive one
USUAL_SHARE = 0.4  # of the keypoints that are matched at least in good pairs of Middlebury
CONSENSUS, CONSENSUS_SHARE = 30, 0.3  # matches that agree are no accident


def doubtful(result: StereoFeatures) -> bool:
    """Whether matches are near nothing, or so few and unlike each other that most are wrong."""
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
    """The likeliest cause, and a sentence, of few matches between images with many keypoints.

    Descriptors are matched again without the limits of a rectified pair: what agrees then, and
    where, tells the cause.

    Args:
        depths: nearest and farthest that are searched, metres.
    """
    left, right = _loose_matches(result)
    rows = right[:, 1] - left[:, 1]
    infinity = result.calibration.offset if result.calibration else 0.0
    disparity = (left[:, 0] - right[:, 0] - infinity)[np.abs(rows) <= SAME_ROW]
    ahead, behind = int((disparity > 1).sum()), int((disparity < -1).sum())
    if behind >= max(CONSENSUS, SWAPPED * ahead):
        return "swapped", "left and right are swapped: many match when tried the other way round"
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
    """Places (M, 2) in both images of mutual nearest neighbours that are alike, wherever they are.

    Only the strongest keypoints are looked at.
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
    """Why matches that keep to their rows are not taken; `parallax` is their usual one, pixels."""
    calibration = result.calibration
    if calibration is not None:
        depth = calibration.fx * calibration.baseline / parallax
        if not depths[0] <= depth <= depths[1]:
            return (
                "depth limits",
                f"many match with disparities around {parallax + calibration.offset:.0f} px, a "
                f"depth of {depth:.3g} m by camera_info, which min_depth or max_depth rules out",
            )
    return (
        "poor images",
        "the images are noisy, blurred or dim, so that few keypoints look alike in both",
    )


def row_evidence(
    result: StereoFeatures, cameras: tuple[Camera, Camera]
) -> tuple[float, float, float, int]:
    """How the rows of matches would change by rectification, and how that fits their differences.

    Returns:
        Sums over the matches: difference times expected difference of raw images, the square of
        the latter, the square of the former; and the number of matches.
    """
    left = result.left.keypoints[result.left_index]
    right = result.right.keypoints[result.right_index]
    differ = right[:, 1] - left[:, 1]
    rectified = cameras[1].rectify(right)[:, 1] - cameras[0].rectify(left)[:, 1]
    expected = differ - rectified
    known = np.isfinite(expected) & (np.abs(expected) < 10 * SAME_ROW)
    differ, expected = differ[known], expected[known]
    sums = (float(differ @ expected), float(expected @ expected), float(differ @ differ))
    return *sums, len(differ)
