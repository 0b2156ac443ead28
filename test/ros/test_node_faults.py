"""What goes wrong on robots, done to the node as a process of its own."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import rclpy
from conftest import DOMAIN, OTHER_DOMAIN, NodeProcess
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from kp_frontend.ros.stereo_input import SIDES
from kp_frontend.tools.soak_inputs import BAD, GOOD

SMALL = ("threads:=1", "image_width:=320", "image_height:=240", "max_keypoints:=512")


@pytest.fixture(scope="module")
def node():
    """A node that must survive all tests of this module that use it, and balance at the end."""
    process = NodeProcess(DOMAIN, "backend:=torch", "reliable:=true", *SMALL)
    yield process
    assert process.child.poll() is None, "the node died"
    words = process.close()
    assert process.child.returncode == 0, words
    assert words.count("the right image is dark") == 1  # logged when it began, not every second
    counts = {
        name: int(number)
        for name, number in (part.split() for part in words.split("images: ")[1].split(", "))
    }
    reasons = sum(n for name, n in counts.items() if name.startswith("dropped_"))
    assert counts["received"] == counts["processed"] + counts["dropped"] > 0
    assert counts["dropped"] == reasons


def count(node: NodeProcess, reason: str) -> int:
    return node.counts.get(f"dropped_{reason}", 0)


def settle(node: NodeProcess, pair: tuple[np.ndarray, np.ndarray]) -> dict[str, int]:
    """A pair, and the counters after it."""
    node.expect(node.send_pair(*pair))
    node.wait(lambda: node.counts.get("processed") == 2 * len(node.features))
    return dict(node.counts)


def test_every_bad_image_is_counted_and_the_next_pair_works(node, pair):
    before = settle(node, pair)
    for name, spoil in BAD.items():
        stamp = node.next_stamp()
        left, right = (node.image(s, p, stamp) for s, p in zip(SIDES, pair, strict=True))
        spoil(left)
        node.send(left__image=left, right__image=right)
        after = settle(node, pair)
        grown = {reason: after[reason] - before[reason] for reason in before}
        refused = "stamp" in name  # then the other image is left without a partner
        assert grown["dropped_bad"] == (1 if refused else 2), name
        assert grown["dropped_unpaired"] == refused, name
        assert grown["processed"] == 2, name
        before = after


@pytest.mark.parametrize("name", GOOD)
def test_every_encoding_of_a_camera_is_processed(node, pair, name):
    stamp = node.next_stamp()
    images = [node.image(s, p, stamp) for s, p in zip(SIDES, pair, strict=True)]
    for image in images:
        GOOD[name](image)
    node.send(left__image=images[0], right__image=images[1])
    assert len(node.expect(stamp).left_index) > 20


def test_a_covered_lens_is_warned_of_until_it_is_open_again(node, pair):
    covered = np.random.default_rng(0).integers(0, 8, pair[1].shape).astype(np.uint8)

    def told(right: np.ndarray, dark: bool) -> bool:
        node.expect(node.send_pair(pair[0], right))
        return ("the right image is dark" in node.status) == dark

    node.wait(lambda: told(covered, True))
    node.wait(lambda: told(pair[1], False))


def test_one_camera_stops_and_returns(node, pair):
    settle(node, pair)
    unpaired = count(node, "unpaired")
    for _ in range(5):
        node.send(left__image=node.image("left", pair[0], node.next_stamp()))
    node.wait(lambda: "no image comes on /right/image" in node.status)
    assert "no stereo pair for" in node.status
    after = settle(node, pair)
    assert after["dropped_unpaired"] == unpaired + 5


def test_cameras_of_different_clocks_are_explained(node, pair):
    settle(node, pair)
    stamp = node.next_stamp()
    for _ in range(3):
        node.send(left__image=node.image("left", pair[0], stamp))
        node.send(right__image=node.image("right", pair[1], stamp + 7_000_000))
        stamp = node.next_stamp()
    node.wait(lambda: "stamps are 7.000 ms apart" in node.status)
    assert "approximate_sync" in node.status
    settle(node, pair)


def test_a_stream_that_starts_again_is_taken_up(node, pair):
    """A bag that loops: the stamps go back."""
    node._stamp += 20 * 10**9
    before = node.expect(node.send_pair(*pair))
    node._stamp -= 5_000_000_000
    again = node.expect(node.send_pair(*pair))
    assert again.sequence == before.sequence + 1
    assert not set(again.left.track_id) & set(before.left.track_id)
    follows = node.expect(node.send_pair(*pair))
    assert set(follows.left.track_id) == set(again.left.track_id)
    node._stamp += 10_000_000_000


def test_a_jump_ahead_starts_new_tracks(node, pair):
    before = node.expect(node.send_pair(*pair))
    node._stamp += 3600 * 10**9
    after = node.expect(node.send_pair(*pair))
    assert not set(after.left.track_id) & set(before.left.track_id)


def test_of_a_burst_the_newest_pair_is_processed_and_the_rest_counted(node, pair):
    before = settle(node, pair)
    stamps = [node.send_pair(*pair) for _ in range(60)]
    node.expect(stamps[-1])
    after = settle(node, pair)
    assert after["dropped_replaced"] > before["dropped_replaced"]
    assert after["received"] == after["processed"] + after["dropped"]
    times = [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in node.features]
    taken = [t for t in times if t in stamps]
    assert taken == sorted(taken) and len(taken) < 60


def test_the_driver_restarts(node, pair):
    """The participant on the other side goes, and another comes."""
    settle(node, pair)
    old = node.publishers
    context = rclpy.Context()
    for publisher in old.values():
        node.node.destroy_publisher(publisher)
    rclpy.init(context=context, domain_id=DOMAIN)
    driver = rclpy.create_node("driver", context=context)
    node.publishers = node.create_publishers(driver)
    node.wait(node.heard)
    settle(node, pair)
    driver.destroy_node()
    rclpy.shutdown(context=context)
    node.publishers = node.create_publishers(node.node)
    node.wait(node.heard)
    settle(node, pair)


def test_an_incompatible_qos_is_said(pair):
    """Best-effort cameras do not serve a node that asks for reliable ones."""
    process = NodeProcess(OTHER_DOMAIN, "backend:=torch", "reliable:=true", *SMALL)
    try:
        for publisher in process.publishers.values():
            process.node.destroy_publisher(publisher)
        qos = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
        for side in SIDES:
            process.node.create_publisher(Image, f"{side}/image", qos)
        process.wait(lambda: "QoS that is incompatible with reliable subscribers" in process.status)
        assert "/left/image" in process.status and "set reliable to false" in process.status
        children = Path(f"/proc/{process.child.pid}/task/{process.child.pid}/children")
        assert children.read_text() == ""
    finally:
        words = process.close(signal.SIGTERM)
    assert process.child.returncode == 0, words
    assert "images: received 0" in words


# The node with an engine called openvino that fails on pictures whose first pixel is 13.
FAULTY = """
import sys
from kp_frontend.backends import backend_module
from kp_frontend.backends.torch_backend import TorchBackend
from kp_frontend.ros.node import main

class Faulty(TorchBackend):
    name = "openvino"

    def __call__(self, images, *rest):
        if images[0][0, 0] == 13:
            raise RuntimeError("out of luck")
        return super().__call__(images, *rest)

def build(pipeline, example, options):
    print("built an engine", file=sys.stderr)
    return Faulty(pipeline)

backend_module("openvino").build = build
for name in ("tensorrt", "cuda"):
    backend_module(name).unavailable = lambda: "not here"
sys.exit(main(sys.argv[1:]))
"""


def test_an_engine_that_fails_is_counted_then_rebuilt_then_replaced(pair):
    node = NodeProcess(OTHER_DOMAIN, "reliable:=true", *SMALL, program=("-c", FAULTY))
    poison = tuple(image.copy() for image in pair)
    poison[0][0, 0] = 13

    def fail(times: int) -> None:
        for _ in range(times):
            before = count(node, "failed")
            node.send_pair(*poison)
            node.wait(lambda n=before: count(node, "failed") == n + 2)

    try:
        settle(node, pair)
        assert node.values["backend"] == "openvino fp32"
        fail(1)
        node.wait(lambda: "failed 1 times in a row: RuntimeError: out of luck" in node.status)
        settle(node, pair)
        fail(3)  # built anew, which helps here
        settle(node, pair)
        node.wait(lambda: node.values["backend"] == "openvino fp32")
        fail(6)  # does not help
        node.expect(node.send_pair(*poison))
        node.wait(lambda: node.values["backend"] == "torch fp32")
    finally:
        words = node.close()
    assert node.child.returncode == 0, words
    assert words.count("built an engine") == 3
    assert "dropped_failed 20," in words
    assert "falling back to the next best backend" in words
