"""What RTAB-Map is given, read back as RTAB-Map reads it; nothing of it is needed for that."""

from __future__ import annotations

import sys
import types
import zlib
from dataclasses import replace

import numpy as np
import pytest
from made_views import corridor, view
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from kp_frontend.ros import rtabmap_bridge
from kp_frontend.ros.messages import stereo_message
from kp_frontend.ros.rtabmap_features import CV_32F, compressed_matrix, rtabmap_features


def record(name, *fields):
    """A class with the constructor of a ROS message."""

    def __init__(self, **values):
        assert set(values) <= set(fields)
        self.__dict__ |= dict.fromkeys(fields) | values

    return type(name, (), {"__init__": __init__})


KINDS = types.SimpleNamespace(
    RGBDImage=record(
        "RGBDImage", "header", "rgb_camera_info", "depth_camera_info", "rgb", "depth",
        "rgb_compressed", "depth_compressed", "key_points", "points", "descriptors",
        "global_descriptor",
    ),
    KeyPoint=record("KeyPoint", "pt", "size", "angle", "response", "octave", "class_id"),
    Point2f=record("Point2f", "x", "y"),
    Point3f=record("Point3f", "x", "y", "z"),
)  # fmt: skip


def uncompressed(data: bytes) -> np.ndarray:
    """As `rtabmap::uncompressData`: the trailer says the size of what zlib gives."""
    rows, columns, kind = np.frombuffer(data[-12:], "<i4")
    assert kind == CV_32F
    return np.frombuffer(zlib.decompress(data[:-12]), "<f4").reshape(rows, columns)


@pytest.fixture(scope="module")
def features():
    """Features of which a third has no match."""
    found = view(corridor(), np.eye(4))
    keep = np.arange(len(found.left)) % 3 > 0
    arrays = ("left_index", "right_index", "disparity", "disparity_sigma", "similarity",
              "confidence", "points")  # fmt: skip
    found = replace(found, **{name: getattr(found, name)[keep] for name in arrays})
    found.points[5] = np.nan  # a point at infinity
    return found


def test_every_keypoint_has_a_point_and_a_descriptor(features):
    found = rtabmap_features(features)
    count = len(features.left)
    assert found.keypoints.shape == (count, 2) and found.points.shape == (count, 3)
    np.testing.assert_array_equal(uncompressed(found.descriptors), features.left.descriptors)
    np.testing.assert_array_equal(found.points[features.left_index], features.points)
    unknown = np.isnan(found.points).all(1)
    assert unknown.sum() == count - len(features) + 1
    assert unknown[features.left_index[5]]


def test_an_image_without_keypoints_is_not_for_rtabmap(features):
    left = features.left
    nothing = replace(left, **{name: value[:0] for name, value in vars(left).items()})
    empty = replace(features, left=nothing, left_index=features.left_index[:0],
                    points=features.points[:0])  # fmt: skip
    with pytest.raises(ValueError, match="no keypoints"):
        rtabmap_features(empty)


def test_the_trailer_is_little_endian():
    data = compressed_matrix(np.ones((2, 3)))
    assert data[-12:] == bytes([2, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0])
    assert len(zlib.decompress(data[:-12])) == 24


def stamped(kind, stamp):
    message = kind(header=Header(frame_id="left_optical"))
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10**9)
    return message


def message_of(features, left_stamp, right_stamp):
    headers = [stamped(Image, stamp).header for stamp in (left_stamp, right_stamp)]
    return stereo_message(features, *headers, 0, "int8")


def test_the_message_has_all_that_rtabmap_reads(features):
    images = stamped(Image, 5), stamped(Image, 6)
    infos = CameraInfo(width=640), CameraInfo(width=641)
    message = rtabmap_bridge.rgbd_image(message_of(features, 5, 6), images, infos, KINDS)
    assert (message.rgb, message.depth) == images
    assert (message.rgb_camera_info, message.depth_camera_info) == infos
    assert message.header.frame_id == "left_optical" and message.header.stamp.nanosec == 5
    count = len(features.left)
    assert len(message.key_points) == len(message.points) == count
    last = message.key_points[-1]
    assert (last.pt.x, last.pt.y) == tuple(features.left.keypoints[-1].tolist())
    assert last.response == 1.0
    descriptors = uncompressed(bytes(message.descriptors))
    np.testing.assert_allclose(descriptors, features.left.descriptors, atol=0.005)  # int8
    broken = message_of(features, 5, 6)
    broken.left_index[0] = 60_000
    with pytest.raises(ValueError, match="do not fit"):
        rtabmap_bridge.rgbd_image(broken, images, infos, KINDS)


def test_images_wait_for_their_features():
    keeper = rtabmap_bridge.PairKeeper()
    for stamp in range(1, 40):
        keeper.put("left", stamped(Image, stamp))
        keeper.put("right", stamped(Image, stamp + 1000))
    with pytest.raises(LookupError, match="left/camera_info and right/camera_info did not arrive"):
        keeper.pair(39, 1039)
    keeper.infos |= {"left": CameraInfo(), "right": CameraInfo()}
    left, right = keeper.pair(30, 1031)
    assert (left.header.stamp.nanosec, right.header.stamp.nanosec) == (30, 1031)
    with pytest.raises(LookupError, match="the left image did not arrive"):
        keeper.pair(3, 1039)  # too old: only the newest are kept


def test_without_rtabmap_msgs_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rtabmap_msgs", None)
    assert rtabmap_bridge.main([]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "apt install ros-$ROS_DISTRO-rtabmap-ros" in lines[0]
