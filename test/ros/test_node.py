"""The node as a process of its own, over real DDS."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import NodeProcess
from sensor_msgs.msg import CameraInfo


def camera_info(shift: float, stamp: int) -> CameraInfo:
    info = CameraInfo(width=320, height=240)
    info.p = [995.0, 0.0, 160.0, shift, 0.0, 995.0, 120.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    info.header.stamp.sec, info.header.stamp.nanosec = divmod(stamp, 10**9)
    return info


def dropped(node: NodeProcess, reason: str) -> int:
    return node.counts.get(f"dropped_{reason}", 0)


def test_without_camera_info_features_flow_and_points_are_nan(stereo_node, pair):
    message = stereo_node.expect(stereo_node.send_pair(*pair))
    assert message.left.header.frame_id == message.header.frame_id == "left_optical"
    assert message.right.header.frame_id == "right_optical"
    assert (message.left.width, message.left.height) == (320, 240)
    count = len(message.left.x)
    assert count > 50
    assert len(message.left.score) == len(message.left.track_id) == len(message.left.y) == count
    assert len(message.left.descriptors) == count * message.left.descriptor_dim * 4
    assert len(message.left_index) > 20
    assert len(message.points) == 3 * len(message.left_index)
    assert np.isnan(message.points).all()
    assert math.isnan(message.fx) and math.isnan(message.baseline)


def test_sequence_counts_pairs_and_tracks_go_on(stereo_node, pair):
    first = stereo_node.expect(stereo_node.send_pair(*pair))
    second = stereo_node.expect(stereo_node.send_pair(*pair))
    assert second.sequence == first.sequence + 1
    # The same pair again: every keypoint is found again under its track.
    assert set(second.left.track_id) == set(first.left.track_id)


@pytest.mark.parametrize("side", ["left", "right"])
def test_unpaired_image_is_counted(stereo_node, pair, side):
    before = dropped(stereo_node, "unpaired")
    lonely = stereo_node.image(side, pair[0], stereo_node.next_stamp())
    stereo_node.send(**{f"{side}__image": lonely})
    stereo_node.expect(stereo_node.send_pair(*pair))
    stereo_node.wait(lambda: dropped(stereo_node, "unpaired") == before + 1)


def test_a_partner_that_comes_after_a_newer_pair_is_late(stereo_node, pair):
    before = {reason: dropped(stereo_node, reason) for reason in ("unpaired", "late")}
    early, late = stereo_node.next_stamp(), stereo_node.next_stamp()
    for side, stamp in (("left", early), ("left", late), ("right", late), ("right", early)):
        image = stereo_node.image(side, pair[0], stamp)
        stereo_node.send(**{f"{side}__image": image})
    stereo_node.expect(late)
    stereo_node.expect(stereo_node.send_pair(*pair))
    for reason, count in before.items():
        stereo_node.wait(lambda r=reason, n=count: dropped(stereo_node, r) == n + 1)
    stereo_node.wait(lambda: stereo_node.counts["waiting"] == 0)


def test_a_stamp_before_the_epoch_is_counted_and_the_next_pair_works(stereo_node, pair):
    before = dropped(stereo_node, "bad")
    image = stereo_node.image("left", pair[0], 0)
    image.header.stamp.sec = -5
    stereo_node.send(left__image=image)
    stereo_node.wait(lambda: dropped(stereo_node, "bad") == before + 1)
    assert stereo_node.expect(stereo_node.send_pair(*pair)).left.x


def test_camera_info_of_another_resolution_gives_no_depth(stereo_node, pair):
    stamp = stereo_node.next_stamp()
    infos = camera_info(0.0, stamp), camera_info(-199.0, stamp)
    for info in infos:
        info.width, info.height = 640, 480
    stereo_node.send(left__camera_info=infos[0], right__camera_info=infos[1])
    stereo_node.send(
        left__image=stereo_node.image("left", pair[0], stamp),
        right__image=stereo_node.image("right", pair[1], stamp),
    )
    assert np.isnan(stereo_node.expect(stamp).points).all()


def bad_encoding(left, right):
    left.encoding = "nonsense"


def bad_step(left, right):
    left.step += 7


def bad_data(left, right):
    right.data = right.data[:1000]


def bad_size(left, right):
    right.height //= 2
    right.data = right.data[: right.height * right.step]


def empty(left, right):
    left.width = left.height = left.step = 0
    left.data = left.data[:0]


@pytest.mark.parametrize("spoil", [bad_encoding, bad_step, bad_data, bad_size, empty])
def test_bad_pair_is_counted_and_the_next_one_works(stereo_node, pair, spoil):
    before = dropped(stereo_node, "bad")
    stamp = stereo_node.next_stamp()
    left, right = (
        stereo_node.image(side, pixels, stamp)
        for side, pixels in zip(("left", "right"), pair, strict=True)
    )
    spoil(left, right)
    stereo_node.send(left__image=left, right__image=right)
    stereo_node.wait(lambda: dropped(stereo_node, "bad") == before + 2)
    assert stereo_node.expect(stereo_node.send_pair(*pair)).left.x


def test_colour_images_give_the_same_features_as_grey(stereo_node, pair):
    stereo_node.start_new_tracks()
    grey = stereo_node.expect(stereo_node.send_pair(*pair))
    stereo_node.start_new_tracks()
    colour = (np.repeat(image[..., None], 3, axis=2) for image in pair)
    same = stereo_node.expect(stereo_node.send_pair(*colour, encoding="bgr8"))
    assert list(same.left.x) == list(grey.left.x)


def test_another_size_works(stereo_node, pair):
    message = stereo_node.expect(stereo_node.send_pair(*(image[:200, :300] for image in pair)))
    assert (message.left.width, message.left.height) == (300, 200)
    assert max(message.left.x) < 300 and max(message.left.y) < 200


def test_camera_info_gives_depth(stereo_node, pair):
    for _ in range(2):
        stamp = stereo_node.next_stamp()
        stereo_node.send(
            left__camera_info=camera_info(0.0, stamp),
            right__camera_info=camera_info(-995.0 * 0.2, stamp),
            left__image=stereo_node.image("left", pair[0], stamp),
            right__image=stereo_node.image("right", pair[1], stamp),
        )
        message = stereo_node.expect(stamp)
    assert (message.fx, message.baseline) == (995.0, pytest.approx(0.2))
    points = np.array(message.points).reshape(-1, 3)
    disparity = np.array(message.disparity)
    known = disparity > 0
    assert known.sum() > 20
    np.testing.assert_allclose(points[known, 2], 995.0 * 0.2 / disparity[known], rtol=1e-4)
    x = np.array(message.left.x)[message.left_index]
    np.testing.assert_allclose(
        points[known, 0], ((x - 160.0) / 995.0 * points[:, 2])[known], rtol=1e-3, atol=1e-5
    )


def test_every_image_is_accounted_for(stereo_node, pair):
    for _ in range(20):
        stereo_node.send_pair(*pair)
        time.sleep(0.01)
    last = stereo_node.send_pair(*pair)
    stereo_node.expect(last)
    before = dict(stereo_node.counts)
    stereo_node.wait(lambda: stereo_node.counts != before)
    stereo_node.wait(
        lambda: stereo_node.counts["received"]
        == stereo_node.counts["processed"] + stereo_node.counts["dropped"]
    )
    assert stereo_node.counts["waiting"] == 0


def test_silence_is_explained(stereo_node):
    stereo_node.wait(lambda: "no stereo pair for" in stereo_node.status)
    assert stereo_node.name == "/kp_frontend: stereo features"


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        ("model:=/no/such.safetensors", "no weights"),
        ("backend:=abacus", "must be one of auto, tensorrt"),
        ("nms_radius:=0", "nms_radius"),
        ("descriptor_type:=float64", "descriptor_type"),
        ("row_tolerance:=2", "row_tolerance"),  # an integer
        ("queue_size:=0", "queue_size"),
        ("--params-file /no/such.yaml", "/no/such.yaml"),
    ],
)
def test_a_node_that_cannot_start_says_why(parameter, words):
    words_of_it = parameter.split() if parameter.startswith("--") else ["-p", parameter]
    command = [sys.executable, "-m", "kp_frontend.cli", "node", "--ros-args", *words_of_it]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if "[rcl]" not in line]  # it has its own
    assert len(lines) == 1
    assert words in lines[0]
