"""Conversion between ROS messages and the types of the front end.

Array fields are filled with an `array.array`, because rclpy copies its bytes directly. Assigning a
list or an ndarray is thousands of times slower.
"""

from __future__ import annotations

import math
import sys
from array import array
from typing import TypeAlias

import numpy as np
from kp_msgs.msg import Features as FeaturesMsg
from kp_msgs.msg import StereoFeatures as StereoFeaturesMsg
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2, PointField
from std_msgs.msg import Header

from kp_frontend.calibration import (
    Camera,
    RawStereoCalibration,
    StereoCalibration,
    Window,
    image_matrices,
)
from kp_frontend.features import Features, StereoFeatures

DESCRIPTOR_TYPES = {
    "float32": FeaturesMsg.FLOAT32,
    "float16": FeaturesMsg.FLOAT16,
    "int8": FeaturesMsg.INT8,
}
_DTYPES = {FeaturesMsg.FLOAT32: "<f4", FeaturesMsg.FLOAT16: "<f2", FeaturesMsg.INT8: "i1"}


def _array(code: str, dtype: str, values: np.ndarray) -> array:
    return array(code, np.ascontiguousarray(values, dtype).tobytes())


ImageMessage: TypeAlias = Image | CompressedImage


def stamp_ns(message: ImageMessage | CameraInfo) -> int:
    """Time stamp of a message in nanoseconds."""
    return message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec


def image_message(pixels: np.ndarray, encoding: str, header: Header | None = None) -> Image:
    """Convert an image (H, W) or (H, W, C) to a message. 16-bit values keep the byte order."""
    rows = np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(np.uint8)
    message = Image(header=header or Header(), encoding=encoding)
    message.height, message.width = pixels.shape[:2]
    message.is_bigendian = sys.byteorder == "big"
    message.step = rows.shape[1]
    message.data = array("B", rows.tobytes())
    return message


def _window(info: CameraInfo) -> Window:
    roi = info.roi
    region = (roi.x_offset, roi.y_offset, roi.width, roi.height)
    return Window(*region, info.binning_x, info.binning_y)


def camera_from_info(info: CameraInfo, size: tuple[int, int]) -> Camera:
    """The camera that a camera_info describes, for images of a size (width, height).

    Raises:
        ValueError: not calibrated, an unknown distortion model, or another image size.
    """
    k, d, r, p = (tuple(map(float, values)) for values in (info.k, info.d, info.r, info.p))
    model, window = info.distortion_model, _window(info)
    return Camera(info.width, info.height, model, k, d, r, p, window).for_image(*size)


def calibration_from_info(
    left: CameraInfo, right: CameraInfo, size: tuple[int, int], raw: bool, baseline: float = 0.0
) -> StereoCalibration:
    """The calibration of a pair of images of a size (width, height).

    Rectified images need only the projection matrices P.

    Args:
        raw: whether the images are not rectified.
        baseline: metres, overrides P; 0 uses P.

    Raises:
        ValueError: not calibrated, no baseline, or another image size.
    """
    if raw:
        cameras = camera_from_info(left, size), camera_from_info(right, size)
        return RawStereoCalibration.from_cameras(*cameras, baseline=baseline or None)
    projections = _projection(left, size), _projection(right, size)
    return StereoCalibration.from_projections(*projections, baseline=baseline or None)


def _projection(info: CameraInfo, size: tuple[int, int]) -> np.ndarray:
    """P (3, 4) for images of a size (width, height)."""
    k, p = np.reshape(info.k, (3, 3)), np.reshape(info.p, (3, 4))
    return image_matrices(k, p, (info.width, info.height), _window(info), size)[1]


def encode_descriptors(descriptors: np.ndarray, kind: int) -> bytes:
    """Encode unit descriptors (N, D) row by row in the type `kind` of the message."""
    if kind == FeaturesMsg.INT8:
        descriptors = np.rint(descriptors * 127).clip(-127, 127)
    return np.ascontiguousarray(descriptors, _DTYPES[kind]).tobytes()


def decode_descriptors(message: FeaturesMsg) -> np.ndarray:
    """Descriptors (N, D) float32 of a message."""
    values = np.frombuffer(message.descriptors, _DTYPES[message.descriptor_type])
    values = values.reshape(-1, message.descriptor_dim).astype(np.float32)
    return values / 127 if message.descriptor_type == FeaturesMsg.INT8 else values


def features_of(message: FeaturesMsg) -> Features:
    """Convert a message to `Features`. Inverse of `features_message`; exact for float32.

    Raises:
        ValueError: the lengths of its arrays are inconsistent, or values are not finite.
    """
    x, y, scores = (np.asarray(v, np.float32) for v in (message.x, message.y, message.score))
    tracks = np.asarray(message.track_id, np.uint32)
    if message.descriptor_type not in _DTYPES:
        raise ValueError(f"descriptor_type {message.descriptor_type} is not known")
    width = message.descriptor_dim * np.dtype(_DTYPES[message.descriptor_type]).itemsize
    if not (len(x) == len(y) == len(scores) == len(tracks)) or (
        len(message.descriptors) != len(x) * width
    ):
        raise ValueError("the arrays of a features message have lengths that do not fit")
    if not all(np.isfinite(values).all() for values in (x, y, scores)):
        raise ValueError("the keypoints of a features message are not finite")
    # Older bags have messages without these fields.
    lengths = _field(message, "track_length", np.uint16, 0, len(x))
    sigma = _field(message, "sigma", np.float32, np.nan, len(x))
    return Features(
        np.column_stack([x, y]), scores, decode_descriptors(message), tracks, lengths, sigma
    )


def _field(
    message: FeaturesMsg | StereoFeaturesMsg, name: str, kind: type, unknown: float, count: int
) -> np.ndarray:
    """An array field of a message with `count` entries, filled with `unknown` if it is absent.

    Raises:
        ValueError: the number of entries is wrong.
    """
    if not hasattr(message, name):
        return np.full(count, unknown, kind)
    values: np.ndarray = np.asarray(getattr(message, name), kind)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} rows")
    return values


def stereo_features(message: StereoFeaturesMsg) -> StereoFeatures:
    """Convert a message to `StereoFeatures`. Inverse of `stereo_message`.

    The message may come from rclpy or from rosbags. It does not contain the calibration's
    `offset` (0 in the result) nor `row_offset` (NaN in the result).

    Raises:
        ValueError: the lengths of its arrays are inconsistent, or values are not finite.
    """
    left, right = features_of(message.left), features_of(message.right)
    left_index = np.asarray(message.left_index, np.uint32)
    right_index = np.asarray(message.right_index, np.uint32)
    disparity, disparity_sigma, similarity, points = (
        np.asarray(v, np.float32)
        for v in (message.disparity, message.disparity_sigma, message.similarity, message.points)
    )
    count = len(left_index)
    each = (right_index, disparity, disparity_sigma, similarity)
    fits = all(len(v) == count for v in each) and len(points) == 3 * count
    if not fits or (left_index >= len(left)).any() or (right_index >= len(right)).any():
        raise ValueError("the matches of a features message do not fit its keypoints")
    if not np.isfinite(disparity).all():
        raise ValueError("the disparities of a features message are not finite")
    if len(message.stage) != len(message.stage_ms):
        raise ValueError("the stages of a features message do not fit their times")
    camera = (message.fx, message.fy, message.cx, message.cy, message.baseline)
    return StereoFeatures(
        width=message.left.width,
        height=message.left.height,
        left=left,
        right=right,
        left_index=left_index,
        right_index=right_index,
        disparity=disparity,
        disparity_sigma=disparity_sigma,
        similarity=similarity,
        confidence=_field(message, "confidence", np.float32, np.nan, count),
        points=points.reshape(-1, 3),
        row_offset=math.nan,
        calibration=None if np.isnan(camera).any() else StereoCalibration(*camera),
        stage_ms=dict(zip(message.stage, map(float, message.stage_ms), strict=True)),
    )


def features_message(
    features: Features, width: int, height: int, header: Header, descriptor_type: str
) -> FeaturesMsg:
    """Convert the features of one image to a message."""
    kind = DESCRIPTOR_TYPES[descriptor_type]
    message = FeaturesMsg(header=header, width=width, height=height)
    message.x = _array("f", "<f4", features.keypoints[:, 0])
    message.y = _array("f", "<f4", features.keypoints[:, 1])
    message.score = _array("f", "<f4", features.scores)
    message.track_id = _array("I", "<u4", features.track_ids)
    message.track_length = _array("H", "<u2", features.track_lengths)
    message.sigma = _array("f", "<f4", features.sigma)
    message.descriptor_dim = features.descriptors.shape[1]
    message.descriptor_type = kind
    message.descriptors = array("B", encode_descriptors(features.descriptors, kind))
    return message


def stereo_message(
    result: StereoFeatures,
    left_header: Header,
    right_header: Header,
    sequence: int,
    descriptor_type: str,
) -> StereoFeaturesMsg:
    """Convert the results of a pair to a message with the header of the left image."""
    size = (result.width, result.height)
    message = StereoFeaturesMsg(header=left_header, sequence=sequence)
    message.left = features_message(result.left, *size, left_header, descriptor_type)
    message.right = features_message(result.right, *size, right_header, descriptor_type)
    message.left_index = _array("I", "<u4", result.left_index)
    message.right_index = _array("I", "<u4", result.right_index)
    message.disparity = _array("f", "<f4", result.disparity)
    message.disparity_sigma = _array("f", "<f4", result.disparity_sigma)
    message.similarity = _array("f", "<f4", result.similarity)
    message.confidence = _array("f", "<f4", result.confidence)
    message.points = _array("f", "<f4", result.points)
    for name in ("fx", "fy", "cx", "cy", "baseline"):
        value = getattr(result.calibration, name) if result.calibration else float("nan")
        setattr(message, name, value)
    message.stage = list(result.stage_ms)
    message.stage_ms = array("f", result.stage_ms.values())
    return message


def points_message(result: StereoFeatures, header: Header) -> PointCloud2:
    """A point cloud of the finite 3-D points, with similarity and confidence of their matches."""
    known = np.isfinite(result.points).all(1)
    columns = [result.points, result.similarity, result.confidence]
    rows = np.column_stack(columns)[known].astype("<f4")
    message = PointCloud2(header=header, height=1, width=len(rows), is_dense=True)
    message.fields = [
        PointField(name=name, offset=4 * i, datatype=PointField.FLOAT32, count=1)
        for i, name in enumerate(("x", "y", "z", "similarity", "confidence"))
    ]
    message.point_step = 4 * len(message.fields)
    message.row_step = message.point_step * len(rows)
    message.data = array("B", rows.tobytes())
    return message
