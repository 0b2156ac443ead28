"""What the front end gives out: the features of an image, and of a stereo pair."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kp_frontend.calibration import StereoCalibration


@dataclass(frozen=True)
class Features:
    """One image's keypoints, strongest first.

    `keypoints` (N, 2) float32 pixels, of the rectified or the raw image as the config's
    `coordinates` says, `scores` (N,) float32 in 0..1, `descriptors` (N, D) float32
    of unit length, `track_ids` (N,) uint32, 0 for none, `track_lengths` (N,) uint16, the pairs in
    which the track was seen, this one included, 0 without a track, `sigma` (N,) float32, one
    standard deviation of the position along an axis, pixels, NaN where it is not known.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    descriptors: np.ndarray
    track_ids: np.ndarray
    track_lengths: np.ndarray
    sigma: np.ndarray

    def __len__(self) -> int:
        return len(self.keypoints)


@dataclass(frozen=True)
class StereoFeatures:
    """Everything about one pair.

    Match i pairs left keypoint `left_index[i]` with right keypoint `right_index[i]` (uint32).
    `disparity` and `disparity_sigma` (M,) float32 pixels, `similarity` (M,) float32, the cosine of
    the descriptors, `confidence` (M,) float32, the probability that the match is right (within
    3 px), NaN where it is not known, `points` (M, 3) float32 metres in the left rectified optical
    frame, NaN without calibration.
    `row_offset` is the median of the matches' right row minus left row, rectified pixels, NaN
    without matches: what it differs from 0 the rig's calibration is off. `stage_ms` is the time
    each stage took.
    """

    width: int
    height: int
    left: Features
    right: Features
    left_index: np.ndarray
    right_index: np.ndarray
    disparity: np.ndarray
    disparity_sigma: np.ndarray
    similarity: np.ndarray
    confidence: np.ndarray
    points: np.ndarray
    row_offset: float
    calibration: StereoCalibration | None
    stage_ms: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.left_index)
