"""Converts features to the format of RTAB-Map. Does not need RTAB-Map.

Checked against RTAB-Map 0.23.8 (5fad2d2) and the ros2 branch of rtabmap_ros (aec4f91).
`rtabmap_msgs/RGBDImage` has `key_points`, `points` and `descriptors`; `uncompressData` reads the
descriptors.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from kp_frontend.features import StereoFeatures

CV_32F = 5  # OpenCV's type of a matrix of float32 with one channel
KEYPOINT_SIZE = 9.0  # pixels; diameter of the image region that a descriptor describes
NO_ANGLE = -1.0  # OpenCV's value for keypoints without an orientation


@dataclass(frozen=True)
class RtabmapFeatures:
    """Features of a left image.

    `keypoints` (N, 2) float32 pixels, `responses` (N,) float32, `points` (N, 3) float32 metres in
    the optical frame of the image, NaN without depth, `descriptors` the bytes that RTAB-Map's
    `uncompressData` converts to a float32 matrix (N, D).
    """

    keypoints: np.ndarray
    responses: np.ndarray
    points: np.ndarray
    descriptors: bytes


def rtabmap_features(features: StereoFeatures) -> RtabmapFeatures:
    """Features of the left image. Each keypoint gets a point, as RTAB-Map requires.

    Raises:
        ValueError: there are no keypoints. If its first image has none, RTAB-Map detects its own,
            and then rejects all of ours, because the sizes of the descriptors differ.
    """
    left = features.left
    if not len(left):
        raise ValueError("the image has no keypoints")
    points = np.full((len(left), 3), np.nan, np.float32)
    known = np.isfinite(features.points).all(1)
    points[features.left_index[known]] = features.points[known]
    return RtabmapFeatures(
        left.keypoints.astype(np.float32),
        left.scores.astype(np.float32),
        points,
        compressed_matrix(left.descriptors),
    )


def compressed_matrix(matrix: np.ndarray) -> bytes:
    """A matrix (N, D) in RTAB-Map's format: the rows compressed by zlib, followed by the number of
    rows, of columns and OpenCV's type as three little-endian int32."""
    values = np.ascontiguousarray(matrix, "<f4")
    trailer = np.array([*values.shape, CV_32F], "<i4")
    # Level 1: descriptors hardly compress, and a higher level takes ten times as long.
    return zlib.compress(values.tobytes(), 1) + trailer.tobytes()
