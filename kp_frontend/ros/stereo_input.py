"""The input of the node: subscriptions, pairing of images, and detection of time jumps.

Everything here runs in the executor's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from builtin_interfaces.msg import Time
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import Header

from kp_frontend.clocks import clock_offset, period
from kp_frontend.ros import standins
from kp_frontend.ros.camera_infos import CameraInfos
from kp_frontend.ros.image_counters import ImageCounters
from kp_frontend.ros.messages import ImageMessage, stamp_ns
from kp_frontend.ros.parameters import NodeConfig
from kp_frontend.ros.topics import Topics

standins.put_on_path()
import message_filters  # noqa: E402  the installed one, or ours if it is missing

SIDES = ("left", "right")
JUMP_BACK = 500_000_000  # ns; if a camera's stamps go back by more, time has jumped back
JUMP_AHEAD = 10_000_000_000  # ns; if they go ahead by more, time has jumped ahead
RECENT = 20  # number of recent stamps and arrival times stored per camera
LATE_PARTNER = 0.1  # seconds between the arrivals of a pair's images above which to warn
LATCHED = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)


@dataclass(frozen=True)
class Arrived:
    """An image in the synchroniser. The stamp in `header` is on the clock of the left camera."""

    header: Header
    image: ImageMessage
    came: int  # monotonic nanoseconds


class StereoInput:
    """Subscribes to both cameras and passes on the pairs in time order.

    Args:
        on_pair: called with each pair. It must not raise, or the synchroniser stays locked.
        on_jump: called with a message when time jumped and the waiting images were dropped.
        on_bad: called with a message for each invalid image.
    """

    def __init__(
        self,
        node: LifecycleNode,
        config: NodeConfig,
        counters: ImageCounters,
        infos: CameraInfos,
        on_pair: Callable[[ImageMessage, ImageMessage], None],
        on_jump: Callable[[str], None],
        on_bad: Callable[[str], None],
    ) -> None:
        self._node, self._config, self._counters, self._infos = node, config, counters, infos
        self._on_pair, self._on_jump, self._on_bad = on_pair, on_jump, on_bad
        self._offset = round(1e9 * config.sync_offset)
        # Stamp on the left camera's clock and arrival time of each image.
        self._recent = tuple(deque[tuple[int, int]](maxlen=RECENT) for _ in SIDES)
        self._apart = deque[int](maxlen=RECENT)  # ns from a pair's left image to its right one
        self._last_paired: list[int | None] = [None, None]
        self._count = [0, 0]  # images that arrived since the last pair
        self.topics = Topics(node, config)
        self._qos = QoSProfile(
            depth=config.queue_size,
            reliability=(
                ReliabilityPolicy.RELIABLE if config.reliable else ReliabilityPolicy.BEST_EFFORT
            ),
        )
        self._subscriptions: list = []
        self._latched: set[str] = set()  # camera_info topics with a transient-local subscription
        gates = []
        for side, name in enumerate(SIDES):
            # Infos first: then a camera_info arrives before the image with the same stamp.
            self._subscribe(CameraInfo, f"{name}/camera_info", partial(infos.add, side))
            gate = message_filters.SimpleFilter()
            for topic, kind in self.topics.of_images(name):
                self._subscribe(kind, topic, partial(self._on_image, side, gate))
            gates.append(gate)
        if config.approximate_sync:
            self._sync = message_filters.ApproximateTimeSynchronizer(
                gates, config.queue_size, config.sync_slop
            )
        else:
            self._sync = message_filters.TimeSynchronizer(gates, config.queue_size)
        self._sync.registerCallback(self._paired)
        self.look_for_latched_infos()

    def _subscribe(
        self, kind: type, topic: str, callback: Callable, qos: QoSProfile | None = None
    ) -> None:
        # A topic may have publishers that are transient local and others that are not.
        report = None if qos else lambda _: self._on_incompatible(topic)
        events = SubscriptionEventCallbacks(incompatible_qos=report, use_default_callbacks=False)
        self._subscriptions.append(
            self._node.create_subscription(
                kind, topic, callback, qos or self._qos, event_callbacks=events
            )
        )

    def look_for_latched_infos(self) -> None:
        """Subscribe to camera_infos that were published once, before this node started.

        This needs a transient-local subscription. It is created only if a publisher offers this
        QoS, because otherwise the driver warns about an incompatible subscriber.
        """
        for side in self._infos.missing():
            topic = f"{SIDES[side]}/camera_info"
            if topic not in self._latched and self.topics.latched(topic):
                self._latched.add(topic)
                self._subscribe(CameraInfo, topic, partial(self._infos.add, side), LATCHED)

    def _on_incompatible(self, topic: str) -> None:
        self._node.get_logger().warning(self.topics.incompatible(topic))

    def waiting(self) -> int:
        """Number of images that wait for their partner."""
        return sum(len(queue) for queue in self._sync.queues)

    def close(self) -> None:
        """End the subscriptions and drop the images that wait for a partner."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._give_up()

    def _give_up(self) -> None:
        for queue in self._sync.queues:
            queue.clear()

    def _on_image(self, side: int, gate: message_filters.SimpleFilter, image: ImageMessage) -> None:
        came = time.monotonic_ns()
        self._count[side] += 1
        stamp = stamp_ns(image) - (self._offset if side == 1 else 0)
        header = image.header
        if header.stamp.sec < 0 or header.stamp.nanosec >= 1_000_000_000 or stamp < 0:
            # The synchroniser cannot handle such a stamp.
            self._counters.received(refused="bad")
            self._on_bad(
                f"image dropped: its time stamp of {header.stamp.sec} s and "
                f"{header.stamp.nanosec} ns is invalid"
            )
            return
        self._watch_time(side, stamp)
        self._recent[side].append((stamp, came))
        last = self._last_paired[side]
        if last is not None and stamp <= last:
            self._counters.received(refused="late")
            return
        self._counters.received()
        if stamp != stamp_ns(image):
            seconds, nanoseconds = divmod(stamp, 1_000_000_000)
            header = Header(stamp=Time(sec=seconds, nanosec=nanoseconds))
        gate.signalMessage(Arrived(header, image, came))

    def _watch_time(self, side: int, stamp: int) -> None:
        """Restart the stream if a camera's stamps jump, for example when a bag loops."""
        if not self._recent[side]:
            return
        change = stamp - self._recent[side][-1][0]
        if -JUMP_BACK < change < JUMP_AHEAD:
            return
        self._give_up()
        self._infos.clear()
        self._last_paired = [None, None]
        self._apart.clear()
        for recent in self._recent:  # both cameras jump, but this is one event
            recent.clear()
        direction = "ahead" if change > 0 else "back"
        self._on_jump(
            f"time jumped {direction} by {abs(change) / 1e9:.1f} s: tracks and queues are reset"
        )

    def _paired(self, left: Arrived, right: Arrived) -> None:
        # Drop images that are older than this pair, so that pairs stay in order.
        for side, arrived in enumerate((left, right)):
            queue, stamp = self._sync.queues[side], stamp_ns(arrived)
            for older in [s for s in queue if s < stamp]:
                del queue[older]
            self._last_paired[side] = stamp
        self._counters.paired()
        self._count = [0, 0]
        self._apart.append(right.came - left.came)
        self._on_pair(left.image, right.image)

    def missing_infos(self) -> str:
        """Topics without camera_info, with the reason if known; empty if all have arrived."""
        needed = [f"{SIDES[side]}/camera_info" for side in self._infos.needed()]
        words = " and ".join(map(self.topics.missing_info, needed))
        if len(needed) == 1 and not self._infos.raw:
            words += "; or set baseline, then the camera_info of one camera is enough"
        return words

    def clock_problem(self) -> str:
        """A message if the images of a pair do not arrive together, else an empty string."""
        frame = period([came for _, came in self._recent[0]])
        if len(self._apart) < RECENT // 2 or frame is None:
            return ""
        # Above a frame period, images of other pairs arrived in between.
        apart = float(np.median(self._apart)) / 1e9
        if abs(apart) < max(LATE_PARTNER, 1.5e-9 * frame):
            return ""
        first, second = SIDES if apart > 0 else SIDES[::-1]
        return (
            f"the {second} image of a pair arrives {1e3 * abs(apart):.0f} ms after the {first} "
            "one: if the cameras' clocks differ, synchronise them or set "
            f"sync_offset to {self._config.sync_offset - apart:.3f}"
        )

    def why_no_pairs(self) -> str:
        """The most likely reason why there are no pairs."""
        silent = [name for name, count in zip(SIDES, self._count, strict=True) if not count]
        if silent:
            return self.topics.why_silent(silent)
        for name, recent in zip(SIDES, self._recent, strict=True):
            if len(recent) > 2 and len({stamp for stamp, _ in recent}) == 1:
                return (
                    f"the time stamp of all images of {self.topics.name(name)} is "
                    f"{recent[0][0] / 1e9:.9f}: the driver does not set it"
                )
        new = [
            [both for both in recent if last is None or both[0] > last]
            for recent, last in zip(self._recent, self._last_paired, strict=True)
        ]
        if not all(new):
            return "the images' stamps are no times, or older than the last pair's"
        return self._stamps_apart(clock_offset(*new) or 0)

    def _stamps_apart(self, offset: int) -> str:
        """The time stamp difference (nanoseconds, right ahead of left), and how to fix it."""
        frame = period([stamp for stamp, _ in self._recent[0]]) or 0.0
        after = ", after sync_offset" if self._offset else ""
        if abs(offset) > frame:
            return (
                f"the cameras' clocks differ: their stamps are about {abs(offset) / 1e6:.0f} ms "
                f"apart (the {'right' if offset > 0 else 'left'} camera's are ahead){after}; "
                "synchronise the clocks, or set sync_offset to "
                f"{(self._offset + offset) / 1e9:.3f}"
                + ("" if self._config.approximate_sync else " and approximate_sync to true")
            )
        apart = f"the cameras' stamps are {abs(offset) / 1e6:.3f} ms apart{after}"
        if not self._config.approximate_sync:
            return (
                f"{apart} and must be equal; if the cameras have clocks of their own, "
                "set approximate_sync"
            )
        return f"{apart}, sync_slop allows {1e3 * self._config.sync_slop:.3f} ms"
