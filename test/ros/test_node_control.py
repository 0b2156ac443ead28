"""Parameters, life cycle, calibration and what is published for people, of the node process."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import DOMAIN, OTHER_DOMAIN, NodeProcess
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import ParameterType
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient
from sensor_msgs.msg import CameraInfo, Image, PointCloud2

SMALL = ("backend:=torch", "threads:=1", "image_width:=320", "image_height:=240",
         "max_keypoints:=512", "reliable:=true")  # fmt: skip


@pytest.fixture(scope="module")
def node():
    """A node that waits for its life cycle's commands, in a simulation that never starts its clock.

    It must still run at the end.
    """
    process = NodeProcess.__new__(NodeProcess)
    process.heard = lambda: process.node.count_publishers("/diagnostics") > 0
    process.__init__(DOMAIN, "autostart:=false", "use_sim_time:=true", *SMALL)
    del process.heard
    yield process
    assert process.child.poll() is None, "the node died"
    words = process.close()
    assert process.child.returncode == 0, words


def call(node: NodeProcess, kind: type, name: str, request: object) -> object:
    client = node.node.create_client(kind, f"kp_frontend/{name}")
    node.wait(client.service_is_ready)
    future = client.call_async(request)
    node.wait(future.done, 60)
    node.node.destroy_client(client)
    return future.result()


def change(node: NodeProcess, transition: int) -> str:
    """Ask for a transition; the state after it."""
    request = ChangeState.Request(transition=Transition(id=transition))
    assert call(node, ChangeState, "change_state", request).success
    return call(node, GetState, "get_state", GetState.Request()).current_state.label


def set_parameter(node: NodeProcess, **values: object) -> list[str]:
    """Set parameters together; the reason of each refusal, or an empty string."""
    client = AsyncParameterClient(node.node, "kp_frontend")
    node.wait(client.services_are_ready)
    future = client.set_parameters_atomically([Parameter(k, value=v) for k, v in values.items()])
    node.wait(future.done)
    result = future.result().result
    return "" if result.successful else result.reason or "no reason"


def test_the_life_cycle_goes_round_without_losing_the_engine(node, pair):
    node.wait(lambda: node.status == "inactive")
    assert change(node, Transition.TRANSITION_CONFIGURE) == "inactive"
    assert not node.publishers["left/image"].get_subscription_count()
    assert change(node, Transition.TRANSITION_ACTIVATE) == "active"
    node.wait(node.heard)
    first = node.expect(node.send_pair(*pair))
    for impossible in (Transition.TRANSITION_CONFIGURE, 250):  # refused, and the node goes on
        request = ChangeState.Request(transition=Transition(id=impossible))
        assert not call(node, ChangeState, "change_state", request).success
    assert change(node, Transition.TRANSITION_DEACTIVATE) == "inactive"
    node.wait(lambda: not node.heard())
    node.wait(lambda: (node.status, node.values["backend"]) == ("inactive", "torch fp32"))
    assert change(node, Transition.TRANSITION_ACTIVATE) == "active"
    node.wait(node.heard)
    again = node.expect(node.send_pair(*pair))
    assert again.sequence == first.sequence + 1
    assert not set(again.left.track_id) & set(first.left.track_id)
    change(node, Transition.TRANSITION_DEACTIVATE)
    assert change(node, Transition.TRANSITION_CLEANUP) == "unconfigured"
    assert change(node, Transition.TRANSITION_CONFIGURE) == "inactive"
    assert change(node, Transition.TRANSITION_ACTIVATE) == "active"
    node.wait(node.heard)
    assert node.expect(node.send_pair(*pair)).left.x


def test_parameters_change_between_two_pairs(node, pair):
    node.start_new_tracks()  # points of known tracks may have lower scores
    before = node.expect(node.send_pair(*pair))
    assert set_parameter(node, score_threshold=0.6, descriptor_type="int8") == ""
    node.start_new_tracks()
    after = node.expect(node.send_pair(*pair))
    assert 0 < len(after.left.x) < len(before.left.x)
    assert min(after.left.score) > 0.6
    assert len(after.left.descriptors) == len(after.left.x) * after.left.descriptor_dim
    assert set_parameter(node, score_threshold=0.03, descriptor_type="float32") == ""
    node.start_new_tracks()
    assert len(node.expect(node.send_pair(*pair)).left.x) == len(before.left.x)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_keypoints": 64}, "read-only"),
        ({"model": "base"}, "read-only"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"score_threshold": float("nan")}, "score_threshold"),
        ({"descriptor_type": "float64"}, "must be one of float32, float16, int8"),
        ({"min_depth": 5.0, "max_depth": 2.0}, "min_depth is 5.0, must be at most max_depth"),
        ({"min_margin": 0.1}, "restart"),
        ({"row_tolerance": "wide"}, "Wrong parameter type"),
    ],
)
def test_a_bad_value_is_refused_with_a_reason(node, pair, values, words):
    before = node.expect(node.send_pair(*pair))
    assert words in set_parameter(node, **values)
    after = node.expect(node.send_pair(*pair))
    assert len(after.left.x) == len(before.left.x)


def test_every_parameter_says_what_it_is(node):
    client = AsyncParameterClient(node.node, "kp_frontend")
    node.wait(client.services_are_ready)
    names = ["max_keypoints", "score_threshold", "descriptor_type", "max_depth"]
    future = client.describe_parameters(names)
    node.wait(future.done)
    count, score, kind, depth = future.result().descriptors
    assert (count.type, count.read_only) == (ParameterType.PARAMETER_INTEGER, True)
    assert (count.integer_range[0].from_value, count.integer_range[0].to_value) == (2, 65536)
    assert (score.read_only, score.floating_point_range[0].to_value) == (False, 1.0)
    assert kind.description.startswith("float32, float16 or int8")
    assert depth.floating_point_range[0].to_value == float("inf")


def test_a_rig_whose_rows_are_off_is_warned_of(node, pair):
    change(node, Transition.TRANSITION_DEACTIVATE)  # the figures start anew
    change(node, Transition.TRANSITION_ACTIVATE)
    node.wait(node.heard)
    left, right = pair
    for _ in range(6):
        node.expect(node.send_pair(left, np.roll(right, 1, axis=0)))
    node.wait(lambda: "the right image's rows are +" in node.status)
    assert 0.8 < float(node.values["row_offset_px"]) < 1.2


def camera_info(side: str, stamp: int, fx: float, **changes: object) -> CameraInfo:
    shift = -0.2 * fx if side == "right" else 0.0
    info = CameraInfo(width=320, height=240, distortion_model="plumb_bob")
    info.k = [fx, 0.0, 160.0, 0.0, fx, 120.0, 0.0, 0.0, 1.0]
    info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    info.p = [fx, 0.0, 160.0, shift, 0.0, fx, 120.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    info.d = [0.0] * 5
    info.header.stamp.sec, info.header.stamp.nanosec = divmod(stamp, 10**9)
    for name, value in changes.items():
        setattr(info, name, value)
    return info


def send_with_infos(
    node: NodeProcess, pair: tuple[np.ndarray, np.ndarray], fx: float, **changes: object
) -> int:
    stamp = node.next_stamp()
    for side in ("left", "right"):
        info = camera_info(side, stamp, fx, **changes)
        node.send(**{f"{side}__camera_info": info})
    for side, pixels in zip(("left", "right"), pair, strict=True):
        node.send(**{f"{side}__image": node.image(side, pixels, stamp)})
    return stamp


def test_a_camera_info_that_changes_is_taken_up(node, pair):
    node.wait(lambda: "no camera_info comes on /left/camera_info" in node.status)
    for fx in (995.0, 500.0):
        message = node.expect(send_with_infos(node, pair, fx))
        assert (message.fx, message.baseline) == (fx, pytest.approx(0.2))
        points = np.array(message.points).reshape(-1, 3)
        assert np.isfinite(points).all(1).sum() > 20


def test_viewers_come_and_go_while_the_stream_goes_on(node, pair):
    clouds, pictures = [], []
    points = node.node.create_subscription(PointCloud2, "kp_frontend/points", clouds.append, 2)
    picture = node.node.create_subscription(Image, "kp_frontend/debug_image", pictures.append, 2)

    def seen() -> bool:
        node.expect(send_with_infos(node, pair, 995.0))
        return bool(clouds and pictures)

    node.wait(seen)
    message = node.expect(send_with_infos(node, pair, 995.0))
    node.wait(lambda: clouds[-1].header == message.header == pictures[-1].header)
    cloud = clouds[-1]
    rows = np.frombuffer(cloud.data, "<f4").reshape(cloud.width, 5)
    expected = np.array(message.points, np.float32).reshape(-1, 3)
    known = np.isfinite(expected).all(1)
    np.testing.assert_array_equal(rows[:, :3], expected[known])
    for i, name in ((3, "similarity"), (4, "confidence")):
        values = np.array(getattr(message, name), np.float32)[known]
        np.testing.assert_array_equal(rows[:, i], values)
        assert cloud.fields[i].name == name
    shown = np.frombuffer(pictures[-1].data, np.uint8).reshape(240, -1, 3)
    assert shown.shape == (240, 320, 3)
    assert (shown.min(2) != shown.max(2)).mean() > 0.005  # coloured dots
    assert set_parameter(node, publish_points=False) == ""
    node.expect(send_with_infos(node, pair, 995.0))
    count = len(clouds)
    before = len(pictures)
    node.wait(lambda: seen() and len(pictures) > before)
    assert len(clouds) <= count + 1  # one may have been under way
    for subscription in (points, picture):
        node.node.destroy_subscription(subscription)
    message = node.expect(send_with_infos(node, pair, 995.0))
    assert message.left.x
    assert set_parameter(node, publish_points=True) == ""


def test_raw_images_are_processed_once_they_are_calibrated(pair):
    # Without tracks, so that each result depends on its own calibration alone.
    own = ("input:=raw", "approximate_sync:=true", "max_motion:=0.0")
    raw = NodeProcess(OTHER_DOMAIN, *own, *SMALL)
    try:
        raw.send_pair(*pair)
        raw.wait(lambda: raw.counts.get("dropped_uncalibrated") == 2)
        raw.wait(lambda: "no pair can be processed: no camera_info" in raw.status)
        send_with_infos(raw, pair, 995.0, distortion_model="omnidirectional")
        raw.wait(lambda: raw.counts["dropped_uncalibrated"] == 4)
        raw.wait(lambda: "distortion model 'omnidirectional' is not known" in raw.status)
        straight = raw.expect(send_with_infos(raw, pair, 995.0))
        bent = raw.expect(send_with_infos(raw, pair, 995.0, d=[-0.5, 0.2, 0.0, 0.0, 0.0]))
        assert len(straight.left_index) > 50 and len(bent.left_index) > 30
        moved = np.abs(np.array(bent.left.x)[:50] - np.array(straight.left.x)[:50])
        assert 0.5 < moved.max() < 10
        stamp = raw.next_stamp()  # the cameras' clocks differ by less than the slop
        raw.send(left__image=raw.image("left", pair[0], stamp))
        raw.send(right__image=raw.image("right", pair[1], stamp + 8_000_000))
        assert len(raw.expect(stamp).left_index) > 30
        assert set_parameter(raw, coordinates="raw") == ""
        again = raw.expect(send_with_infos(raw, pair, 995.0, d=[-0.5, 0.2, 0.0, 0.0, 0.0]))
        np.testing.assert_allclose(again.left.x[:50], straight.left.x[:50], atol=0.01)
        np.testing.assert_allclose(again.disparity, bent.disparity, atol=1e-4)
    finally:
        words = raw.close()
    assert raw.child.returncode == 0, words
