"""Results to messages and back."""

from __future__ import annotations

import numpy as np
import pytest
from kp_msgs.msg import Features as FeaturesMsg
from rclpy.serialization import deserialize_message, serialize_message
from std_msgs.msg import Header

from kp_frontend.config import FrontendConfig
from kp_frontend.frontend import StereoFrontend
from kp_frontend.ros.messages import DESCRIPTOR_TYPES, decode_descriptors, stereo_message


@pytest.mark.parametrize(
    ("kind", "size", "error"), [("float32", 4, 0), ("float16", 2, 1e-3), ("int8", 1, 4e-3)]
)
def test_everything_survives_the_wire(pair, kind, size, error):
    result = StereoFrontend(FrontendConfig(backend="torch", max_keypoints=200))(*pair)
    message = stereo_message(result, Header(frame_id="l"), Header(frame_id="r"), 7, kind)
    message = deserialize_message(serialize_message(message), type(message))
    assert message.sequence == 7
    assert (message.header.frame_id, message.right.header.frame_id) == ("l", "r")
    for sent, got in ((result.left, message.left), (result.right, message.right)):
        np.testing.assert_array_equal(np.column_stack([got.x, got.y]), sent.keypoints)
        np.testing.assert_array_equal(got.score, sent.scores)
        np.testing.assert_array_equal(got.track_id, sent.track_ids)
        np.testing.assert_array_equal(got.track_length, sent.track_lengths)
        np.testing.assert_array_equal(got.sigma, sent.sigma)
        assert len(got.descriptors) == len(sent) * 64 * size
        assert got.descriptor_type == DESCRIPTOR_TYPES[kind]
        np.testing.assert_allclose(decode_descriptors(got), sent.descriptors, atol=error)
    np.testing.assert_array_equal(message.left_index, result.left_index)
    np.testing.assert_array_equal(message.right_index, result.right_index)
    np.testing.assert_array_equal(message.disparity, result.disparity)
    np.testing.assert_array_equal(message.disparity_sigma, result.disparity_sigma)
    np.testing.assert_array_equal(message.similarity, result.similarity)
    np.testing.assert_array_equal(message.confidence, result.confidence)
    assert dict(zip(message.stage, message.stage_ms, strict=True)).keys() == result.stage_ms.keys()


def test_constants():
    assert (FeaturesMsg.FLOAT32, FeaturesMsg.FLOAT16, FeaturesMsg.INT8) == (0, 1, 2)
    assert FeaturesMsg.NOT_TRACKED == 0
