"""The output of the front end: features of an image, and of a stereo pair."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kp_frontend.calibration import StereoCalibration


@dataclass(frozen=True)
class Features:
    """Keypoints of one image, strongest first.

    - `keypoints`: (N, 2) float32, pixels of the rectified or the raw image (config `coordinates`)
    - `scores`: (N,) float32 in 0..1
    - `descriptors`: (N, D) float32, unit length
    - `track_ids`: (N,) uint32, 0 without a track
    - `track_lengths`: (N,) uint16, number of pairs with this track including this one, 0 without a
      track
    - `sigma`: (N,) float32, standard deviation of the position along an axis, pixels, NaN where
      unknown
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
    """Features and matches of one stereo pair.

    - `width`, `height`: size of the images, pixels
    - `left`, `right`: features of the two images
    - `left_index`, `right_index`: (M,) uint32, match i pairs these two keypoints
    - `disparity`, `disparity_sigma`: (M,) float32, disparity and its standard deviation, pixels
    - `similarity`: (M,) float32, cosine similarity of the descriptors
    - `confidence`: (M,) float32, probability that the match is correct (within 3 px), NaN where
      unknown
    - `points`: (M, 3) float32, metres in the left rectified optical frame, NaN without calibration
    - `row_offset`: median of right row minus left row over the matches, rectified pixels, NaN
      without matches; a value other than 0 indicates a calibration error
    - `calibration`: of the rectified pair, None without calibration
    - `stage_ms`: time of each stage
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
