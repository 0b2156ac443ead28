"""Plays a bag to the running node over DDS and collects what the node publishes."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeAlias

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from kp_msgs.msg import StereoFeatures as StereoFeaturesMsg
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rich.progress import Progress
from sensor_msgs.msg import CameraInfo, Image

from kp_frontend.config import FrontendConfig
from kp_frontend.features import StereoFeatures
from kp_frontend.ros.messages import image_message, stereo_features
from kp_frontend.ros.processes import check_alive, private_environment, process
from kp_training.evaluation.bags.reader import COMPRESSED, stamp_of
from kp_training.evaluation.bags.stamps import stamp_text
from kp_training.evaluation.bags.stereo import StereoBag

NODE_START_SECONDS = 180.0  # the engine is compiled at start
PATIENCE = 30.0  # seconds without a word before what is missing is given up; a size is compiled
INPUTS = {
    "left/image": Image,
    "right/image": Image,
    "left/camera_info": CameraInfo,
    "right/camera_info": CameraInfo,
}
Outgoing: TypeAlias = Image | CameraInfo | bytes  # bytes: a serialised message
Spin = Callable[[float], None]  # serves callbacks for at most so many seconds


@dataclass
class Played:
    """Result of a run: serialised features by time stamp, latencies in milliseconds, counters."""

    messages: dict[int, bytes] = field(default_factory=dict)
    latency_ms: dict[int, float] = field(default_factory=dict)  # second image sent to features
    counts: dict[str, str] = field(default_factory=dict)  # the node's own, from its diagnostics

    def features(self, stamp: int) -> StereoFeatures | None:
        """Features of the pair with this time stamp; None if none arrived."""
        raw = self.messages.get(stamp)
        return None if raw is None else stereo_features(deserialize_message(raw, StereoFeaturesMsg))


class _Player(Node):
    """Publishes the images of the bag and subscribes to the node."""

    def __init__(self, played: Played) -> None:
        super().__init__("bag_player")
        self.played = played
        self.sent: dict[int, float] = {}
        self.last_news = time.monotonic()
        reliable = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        self.inputs = {t: self.create_publisher(kind, t, reliable) for t, kind in INPUTS.items()}
        self.create_subscription(
            StereoFeaturesMsg, "kp_frontend/features", self._features, reliable, raw=True
        )
        self.create_subscription(DiagnosticArray, "/diagnostics", self._diagnostics, 5)

    def ready(self) -> bool:
        """Whether the node subscribes to all inputs and its features are received."""
        return (
            all(p.get_subscription_count() for p in self.inputs.values())
            and self.count_publishers("kp_frontend/features") > 0
        )

    def _features(self, raw: bytes) -> None:
        now = time.monotonic()
        stamp = stamp_of(raw)
        self.played.messages[stamp] = bytes(raw)
        self.played.latency_ms[stamp] = 1e3 * (now - self.sent.get(stamp, math.nan))
        self.last_news = now

    def _diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.played.counts |= {v.key: v.value for v in status.values}

    def idle(self, images: int) -> bool:
        """Whether the node has received all images and none is waiting, by its diagnostics."""
        counts = self.played.counts
        return counts.get("received") == str(images) and counts.get("waiting") == "0"


def play(
    camera: StereoBag, config: FrontendConfig, size: tuple[int, int], log: Path, rate: float = 1.0
) -> Played:
    """Start the node, play the bag to it, and wait for what it publishes.

    Args:
        camera: whose images, the unpaired ones too, are sent as they are in the bag; compressed
            ones decoded.
        config: of the node's front end.
        size: (height, width) that the node makes its engine ready for.
        log: file for the node's words.
        rate: times as fast as recorded.

    Raises:
        RuntimeError: the node does not start, or ends early.
    """
    played = Played()
    environment = private_environment()
    os.environ.update(environment)
    with (
        _exit_when_terminated(),
        _spinning(played) as (player, executor),
        Progress(transient=True) as bar,
        process(*node_command(config, camera, size), environment=environment, log=log) as node,
    ):
        task = bar.add_task("starting the node", total=len(camera.stamps))

        def spin(seconds: float) -> None:
            executor.spin_once(timeout_sec=seconds)
            bar.update(task, completed=len(played.messages))
            check_alive(node, log, "the node")

        _wait_until_ready(player, spin)
        bar.update(task, description="playing")
        _send(camera, player, rate, spin)
        _wait_for_the_rest(camera, player, spin)
    return played


@contextmanager
def _exit_when_terminated() -> Iterator[None]:
    """rclpy handles SIGTERM: exit with the same status as a shell would report."""
    try:
        yield
    except ExternalShutdownException:
        sys.exit(143)


@contextmanager
def _spinning(played: Played) -> Iterator[tuple[_Player, SingleThreadedExecutor]]:
    """A player with its executor and context."""
    rclpy.init()
    player = _Player(played)
    executor = SingleThreadedExecutor()
    executor.add_node(player)
    try:
        yield player, executor
    finally:
        executor.shutdown()
        player.destroy_node()
        rclpy.try_shutdown()


def _wait_until_ready(player: _Player, spin: Spin) -> None:
    begin = time.monotonic()
    while not player.ready():
        spin(0.1)
        if time.monotonic() - begin > NODE_START_SECONDS:
            raise RuntimeError(f"the node is not ready after {NODE_START_SECONDS:.0f} s")
    time.sleep(0.5)  # both ends of every connection know each other by now


def _send(camera: StereoBag, player: _Player, rate: float, spin: Spin) -> None:
    """Publish every message of the bag when it is due."""
    for due, topic, message in _schedule(camera, rate):
        while (left := due - time.monotonic()) > 0:
            spin(left)
        spin(0.0)
        if topic.endswith("image"):
            player.sent[_stamp(message)] = time.monotonic()
        player.inputs[topic].publish(message)


def _wait_for_the_rest(camera: StereoBag, player: _Player, spin: Spin) -> None:
    """Wait until the node has processed or dropped every image, then for its last counters."""
    player.last_news = time.monotonic()
    images = sum(camera.images.values())
    while len(player.played.messages) < len(camera.stamps) and not player.idle(images):
        spin(0.1)
        if time.monotonic() - player.last_news > PATIENCE:
            break
    settled = time.monotonic() + 1.5
    while time.monotonic() < settled:
        spin(0.1)


def _stamp(message: Outgoing) -> int:
    """Stamp of a message or of its bytes, nanoseconds."""
    if isinstance(message, bytes):
        return stamp_of(message)
    return message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec


def node_command(
    config: FrontendConfig, camera: StereoBag, size: tuple[int, int]
) -> tuple[str, ...]:
    """Module and arguments that run the node with this front end."""
    reading = camera.reading
    parameters = {
        "image_height": size[0],
        "image_width": size[1],
        "input": "raw" if reading.raw else "rectified",
        "bit_depth": reading.bit_depth,
        "reliable": True,  # what is missing is then the node's doing, not the network's
        "descriptor_type": "float32",  # the only one that is exact
        **{f.name: getattr(config, f.name) for f in fields(config)},
    }
    if reading.slop:
        parameters |= {"approximate_sync": True, "sync_slop": reading.slop}
    if reading.offset:
        parameters |= {"sync_offset": reading.offset}
    if reading.baseline:
        parameters |= {"baseline": reading.baseline}
    words = [w for name, value in parameters.items() for w in ("-p", f"{name}:={_yaml(value)}")]
    return ("kp_frontend.ros.node", "--ros-args", *words)


def _yaml(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isinf(value):
        return ".inf"
    return json.dumps(value)  # quotes text: it may be empty


def _schedule(camera: StereoBag, rate: float) -> Iterator[tuple[float, str, Outgoing]]:
    """The schedule: monotonic time in seconds, topic of the node, message or bytes."""
    topics = camera.topics
    nodes = {
        topics.left: "left/image",
        topics.right: "right/image",
        topics.left_info: "left/camera_info",
        topics.right_info: "right/camera_info",
    }
    names = {topic: name for topic, name in nodes.items() if topic is not None}
    begin, first = time.monotonic(), None
    for topic, when, raw in camera.bag.messages(names):
        first = when if first is None else first
        try:
            message = _prepared(camera, topic, raw)
        except ValueError as error:
            camera.skipped.append(f"{topic}, recorded at {stamp_text(when)}: not sent: {error}")
            continue
        yield begin + (when - first) / 1e9 / rate, names[topic], message


def _prepared(camera: StereoBag, topic: str, raw: bytes) -> Outgoing:
    """Convert a message of the bag for the node: the original bytes, or decoded.

    Raises:
        ValueError: it cannot be decoded.
    """
    if camera.bag.topics[topic].type != COMPRESSED:
        stamp_of(raw)  # without a header it can be neither sent nor paired
        return raw
    message = camera.bag.read(topic, raw)
    result = image_message(camera.grey(message), "mono8")
    result.header.stamp.sec = message.header.stamp.sec
    result.header.stamp.nanosec = message.header.stamp.nanosec
    result.header.frame_id = message.header.frame_id
    return result
