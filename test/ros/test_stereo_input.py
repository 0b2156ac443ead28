"""The node's input: subscriptions, pairs, and what it says if nothing comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pytest
import rclpy
from conftest import OTHER_DOMAIN
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, RegionOfInterest

from kp_frontend.clocks import clock_offset
from kp_frontend.health import Finding
from kp_frontend.ros.camera_infos import CameraInfos
from kp_frontend.ros.diagnostics import Diagnosis, Health, LevelLog
from kp_frontend.ros.image_counters import ImageCounters
from kp_frontend.ros.messages import image_message, stamp_ns
from kp_frontend.ros.parameters import NodeConfig
from kp_frontend.ros.stereo_input import StereoInput

PIXELS = np.full((12, 16), 128, np.uint8)
SECOND = 1_000_000_000


class Rig:
    """A stereo input, and a camera driver in the same process.

    Their participants differ only if asked: one participant cannot have two types on a topic, two
    take seconds to find each other.
    """

    def __init__(
        self, contexts: list[rclpy.Context], apart: bool = False, **settings: object
    ) -> None:
        self.node = LifecycleNode("input", context=contexts[0])
        self.driver = rclpy.create_node("driver", context=contexts[apart])
        self.executor = SingleThreadedExecutor(context=contexts[0])
        self.executor.add_node(self.node)
        self.pairs: list[tuple] = []
        self.bad: list[str] = []
        self.infos = CameraInfos(False, float(settings.get("baseline", 0.0)))
        self.counters = ImageCounters(lambda: self.input.waiting())
        config = NodeConfig(reliable=True, **settings)
        self.input = StereoInput(
            self.node, config, self.counters, self.infos,
            lambda *pair: self.pairs.append(pair), lambda _: None, self.bad.append,
        )  # fmt: skip

    def publisher(self, kind: type, topic: str, latched: bool = False):
        durability = DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE
        reliable = ReliabilityPolicy.RELIABLE
        qos = QoSProfile(depth=10, reliability=reliable, durability=durability)
        publisher = self.driver.create_publisher(kind, topic, qos)
        if not latched:
            self.spin(lambda: publisher.get_subscription_count() > 0)
        return publisher

    def spin(self, ready: Callable[[], object], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, "it does not come about"
            self.executor.spin_once(timeout_sec=0.02)

    def close(self) -> None:
        self.input.close()
        self.executor.shutdown()
        self.driver.destroy_node()
        self.node.destroy_node()


@pytest.fixture(scope="module")
def contexts() -> Iterator[list[rclpy.Context]]:
    made = [rclpy.Context(), rclpy.Context()]
    for context in made:
        rclpy.init(context=context, domain_id=OTHER_DOMAIN)
    yield made
    for context in made:
        rclpy.shutdown(context=context)


@pytest.fixture
def rig(contexts) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(**settings: object) -> Rig:
        made.append(Rig(contexts, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def stamped(message, stamp: int):
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, SECOND)
    return message


def grey(stamp: int) -> Image:
    return stamped(image_message(PIXELS, "mono8"), stamp)


def jpeg(stamp: int) -> CompressedImage:
    data = cv2.imencode(".jpg", PIXELS)[1].tobytes()
    return stamped(CompressedImage(format="jpeg", data=data), stamp)


def info(side: str, size: tuple[int, int] = (16, 12), fx: float = 10.0) -> CameraInfo:
    width, height = size
    found = CameraInfo(width=width, height=height, distortion_model="plumb_bob", d=[0.0] * 5)
    found.k = [fx, 0.0, width / 2, 0.0, fx, height / 2, 0.0, 0.0, 1.0]
    found.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    shift = -0.2 * fx if side == "right" else 0.0
    found.p = [fx, 0.0, width / 2, shift, 0.0, fx, height / 2, 0.0, 0.0, 0.0, 1.0, 0.0]
    return found


@pytest.mark.parametrize("suffix", ["/compressed", ""])
def test_compressed_images_come_on_either_topic(rig, suffix):
    one = rig(transport="compressed")
    sides = [one.publisher(CompressedImage, f"{side}/image{suffix}") for side in ("left", "right")]
    for publisher in sides:
        publisher.publish(jpeg(5 * SECOND))
    one.spin(lambda: one.pairs)
    assert [image.format for image in one.pairs[0]] == ["jpeg", "jpeg"]


def test_what_comes_instead_of_images_is_named(rig):
    one = rig(apart=True)
    assert one.input.why_no_pairs() == "nobody publishes /left/image and /right/image"
    for side in ("left", "right"):
        one.driver.create_publisher(CompressedImage, f"{side}/image/compressed", 1)
    one.spin(lambda: "only compressed images come" in one.input.why_no_pairs())
    assert "/left/image/compressed and /right/image/compressed: set transport" in (
        one.input.why_no_pairs()
    )


def test_another_type_on_the_topic_of_images_is_named(rig):
    one = rig(apart=True)
    one.driver.create_publisher(CompressedImage, "left/image", 1)
    one.driver.create_publisher(CameraInfo, "right/image", 1)
    one.spin(lambda: "type of /right/image is sensor_msgs/msg/CameraInfo" in (
        one.input.why_no_pairs()))  # fmt: skip
    assert "the images on /left/image are CompressedImage" in one.input.why_no_pairs()


def test_images_under_another_name_are_named(rig):
    one = rig()
    for side in ("left", "right"):
        one.driver.create_publisher(Image, f"cam/{side}", 1)
    one.spin(lambda: "images are on /cam/left, /cam/right" in one.input.why_no_pairs())


def test_raw_images_where_compressed_ones_are_wanted(rig):
    one = rig(apart=True, transport="compressed")
    for side in ("left", "right"):
        one.driver.create_publisher(Image, f"{side}/image", 1)
    one.spin(lambda: "are Image, not compressed: set transport to raw" in one.input.why_no_pairs())


def test_camera_info_published_once_before_the_node_started(contexts, rig):
    driver = rclpy.create_node("early_driver", context=contexts[0])
    latched = QoSProfile(
        depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
    )
    for side in ("left", "right"):
        driver.create_publisher(CameraInfo, f"{side}/camera_info", latched).publish(info(side))
    one = rig()
    one.spin(lambda: one.input.look_for_latched_infos() or not one.infos.missing())
    assert one.infos.of_pair((1, 1), (16, 12)).baseline == pytest.approx(0.2)
    driver.destroy_node()


def test_camera_info_of_one_side_is_enough_with_a_baseline(rig):
    for settings, words in (({}, "/right/camera_info"), ({"baseline": 0.3}, "")):
        one = rig(**settings)
        one.publisher(CameraInfo, "left/camera_info").publish(info("left"))
        one.spin(lambda one=one: one.infos.missing() == [1])
        assert one.input.missing_infos().startswith(words)
        assert bool(one.input.missing_infos()) == bool(words)
        calibration = one.infos.of_pair((1, 1), (16, 12))
        assert (calibration and calibration.baseline) == settings.get("baseline")
        one.close()
        one.close = lambda: None


def test_a_region_and_binning_of_camera_info_are_for_the_image_as_it_comes():
    infos = CameraInfos(False)
    for side, name in enumerate(("left", "right")):
        found = info(name, (64, 48), 40.0)
        found.binning_x = found.binning_y = 2
        found.roi = RegionOfInterest(x_offset=8, y_offset=4, width=32, height=24)
        infos.add(side, found)
    calibration = infos.of_pair((1, 1), (16, 12))
    assert (calibration.fx, calibration.cx, calibration.cy) == (20.0, 12.0, 10.0)
    assert calibration.baseline == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"64x48.*16x12, the image has 20x12"):
        infos.of_pair((1, 1), (20, 12))


def send(one: Rig, count: int, ahead: int, every: int = 100_000_000) -> None:
    """Publish pairs whose right stamps are ahead."""
    if not hasattr(one, "sides"):
        one.sides = [one.publisher(Image, f"{side}/image") for side in ("left", "right")]
    for i in range(count):
        before = one.counters.snapshot()["received"]
        for publisher, offset in zip(one.sides, (0, ahead), strict=True):
            publisher.publish(grey(10 * SECOND + i * every + offset))
        one.spin(lambda n=before: one.counters.snapshot()["received"] == n + 2)
        time.sleep(every / SECOND)


def test_clocks_that_differ_by_whole_frames_are_told_by_the_arrival(rig):
    """The stamps alone look as if they were equal."""
    one = rig(approximate_sync=True, queue_size=2)
    send(one, 8, ahead=500_000_000)
    assert not one.pairs
    assert "stamps are about 500 ms apart (the right camera's are ahead)" in (
        one.input.why_no_pairs()
    )
    assert "set sync_offset to 0.500" in one.input.why_no_pairs()


def test_a_constant_offset_between_the_clocks_is_taken_off(rig):
    one = rig(sync_offset=2.0)
    send(one, 3, ahead=2 * SECOND, every=20_000_000)
    one.spin(lambda: len(one.pairs) == 3)
    stamps = [[stamp_ns(image) for image in pair] for pair in one.pairs]
    assert all(right - left == 2 * SECOND for left, right in stamps)  # as the cameras sent them


def test_pairs_that_do_not_arrive_together_are_doubted(rig):
    one = rig(approximate_sync=True)
    send(one, 12, ahead=0, every=30_000_000)
    assert not one.input.clock_problem()
    for _ in range(20):
        one.input._apart.append(-400_000_000)  # the right one came first
    assert "the left image of a pair arrives 400 ms after the right one" in (
        one.input.clock_problem()
    )
    assert "sync_offset to 0.400" in one.input.clock_problem()


def test_stamps_that_are_not_set_are_named(rig):
    one = rig()
    one.sides = [one.publisher(Image, f"{side}/image") for side in ("left", "right")]
    for _ in range(4):
        for publisher in one.sides:
            publisher.publish(grey(0))
    one.spin(lambda: one.counters.snapshot()["received"] == 8)
    one.input._count = [1, 1]
    assert "time stamp of all images of /left/image is 0.000000000" in one.input.why_no_pairs()


def test_a_stamp_that_is_no_time_is_told_in_words(rig):
    one = rig()
    image = grey(0)
    image.header.stamp.sec = -5
    one.publisher(Image, "left/image").publish(image)
    one.spin(lambda: one.bad)
    assert one.bad == ["image dropped: its time stamp of -5 s and 0 ns is invalid"]


def test_the_offset_nearest_to_the_arrivals_is_found():
    arrivals = np.arange(20) * 100 + 7
    left = np.column_stack([np.arange(20) * 100, arrivals])
    for true in (0, 3, 100, 1730, -2000):
        right = np.column_stack([left[:, 0] + true, arrivals + np.tile([4, -9], 10)])
        assert clock_offset(left, right) == true
    assert clock_offset(left, []) is None


# The log


def test_each_change_of_level_is_logged_once_with_every_new_cause():
    said: list[tuple[str, str]] = []

    class Logger:
        def __getattr__(self, level: str) -> Callable[[str], None]:
            return lambda words: said.append((level, words))

    diagnosis = Diagnosis("/front/kp_frontend", LevelLog(Logger()))
    counts = {"received": 0, "processed": 0, "dropped": 0}
    dark = Finding("dark", "both images are dark")
    raw = Finding("raw", "the images look raw")

    def report(**health: object) -> DiagnosticStatus:
        return diagnosis.status(time.monotonic(), counts, {}, Health(True, **health))

    for _ in range(3):
        status = report()
    assert status.name == "/front/kp_frontend: stereo features" and not said
    for seconds in (4.0, 5.0, 6.0):  # nothing arrives, the words change
        report(silent=seconds, why_silent="nobody publishes /left/image")
    for found in ([dark], [dark, raw], [raw], [dark, raw], []):
        report(findings=found)
    report(findings=[dark])
    assert said == [
        ("warning", "no stereo pair for 4 s: nobody publishes /left/image"),
        ("warning", "both images are dark"),
        ("warning", "both images are dark; the images look raw"),
        ("info", "stereo features flow"),
        ("warning", "both images are dark"),
    ]
