"""The stereo camera as the node sees it: subscriptions, pairs, time that jumps.

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
from kp_frontend.ros.accounts import Accounts
from kp_frontend.ros.camera_infos import CameraInfos
from kp_frontend.ros.messages import ImageMessage, stamp_ns
from kp_frontend.ros.parameters import NodeConfig
from kp_frontend.ros.topics import Topics

standins.put_on_path()
import message_filters  # noqa: E402  the real one, or ours where it is missing

SIDES = ("left", "right")
JUMP_BACK = 500_000_000  # ns; a stamp so much before its camera's last one: time itself went back
JUMP_AHEAD = 10_000_000_000  # ns; so much after it: nothing of before helps any more
RECENT = 20  # images of each camera whose stamps and arrivals are remembered
LATE_PARTNER = 0.1  # seconds between the arrivals of a pair's images that are worth a warning
LATCHED = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)


@dataclass(frozen=True)
class Arrived:
    """An image in the synchroniser. `header` has its stamp on the left camera's clock."""

    header: Header
    image: ImageMessage
    came: int  # monotonic nanoseconds


class StereoInput:
    """Subscribes to both cameras and hands on the pairs, in the order of time.

    Args:
        on_pair: called with each pair; must not raise, the synchroniser would stay locked.
        on_jump: called with a sentence when time jumped and all that waited was given up.
        on_bad: called with a sentence for an image that is refused.
    """

    def __init__(
        self,
        node: LifecycleNode,
        config: NodeConfig,
        accounts: Accounts,
        infos: CameraInfos,
        on_pair: Callable[[ImageMessage, ImageMessage], None],
        on_jump: Callable[[str], None],
        on_bad: Callable[[str], None],
    ) -> None:
        self._node, self._config, self._accounts, self._infos = node, config, accounts, infos
        self._on_pair, self._on_jump, self._on_bad = on_pair, on_jump, on_bad
        self._offset = round(1e9 * config.sync_offset)
        # Stamp on the left camera's clock, and arrival, of each image.
        self._recent = tuple(deque[tuple[int, int]](maxlen=RECENT) for _ in SIDES)
        self._apart = deque[int](maxlen=RECENT)  # ns from a pair's left image to its right one
        self._last_paired: list[int | None] = [None, None]
        self._count = [0, 0]  # images that came since the last pair
        self.topics = Topics(node, config)
        self._qos = QoSProfile(
            depth=config.queue_size,
            reliability=(
                ReliabilityPolicy.RELIABLE if config.reliable else ReliabilityPolicy.BEST_EFFORT
            ),
        )
        self._subscriptions: list = []
        self._latched: set[str] = set()  # topics of camera_info that are subscribed to as such
        gates = []
        for side, name in enumerate(SIDES):
            # Infos first: one that comes with its image is then there before it.
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
        events = SubscriptionEventCallbacks(
            incompatible_qos=lambda _: self._on_incompatible(topic), use_default_callbacks=False
        )
        self._subscriptions.append(
            self._node.create_subscription(
                kind, topic, callback, qos or self._qos, event_callbacks=events
            )
        )

    def look_for_latched_infos(self) -> None:
        """Subscribe to camera_infos that were published once, before this node started.

        That needs a QoS of its own. It is asked for only where a publisher offers it, else the
        driver would warn of an incompatible subscriber.
        """
        for side in self._infos.missing():
            topic = f"{SIDES[side]}/camera_info"
            if topic not in self._latched and self.topics.latched(topic):
                self._latched.add(topic)
                self._subscribe(CameraInfo, topic, partial(self._infos.add, side), LATCHED)

    def _on_incompatible(self, topic: str) -> None:
        self._node.get_logger().warning(self.topics.incompatible(topic))

    def waiting(self) -> int:
        """Images that wait for their partner."""
        return sum(len(queue) for queue in self._sync.queues)

    def close(self) -> None:
        """End the subscriptions; what waited for a partner found none."""
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
            # The synchroniser cannot take it.
            self._accounts.received(refused="bad")
            self._on_bad(
                f"image dropped: its stamp of {header.stamp.sec} s and {header.stamp.nanosec} ns "
                "is no time"
            )
            return
        self._watch_time(side, stamp)
        self._recent[side].append((stamp, came))
        last = self._last_paired[side]
        if last is not None and stamp <= last:
            self._accounts.received(refused="late")
            return
        self._accounts.received()
        if stamp != stamp_ns(image):
            seconds, nanoseconds = divmod(stamp, 1_000_000_000)
            header = Header(stamp=Time(sec=seconds, nanosec=nanoseconds))
        gate.signalMessage(Arrived(header, image, came))

    def _watch_time(self, side: int, stamp: int) -> None:
        """Start anew when a camera's stamps jump: a bag that loops, a clock that was set."""
        if not self._recent[side]:
            return
        change = stamp - self._recent[side][-1][0]
        if -JUMP_BACK < change < JUMP_AHEAD:
            return
        self._give_up()
        self._infos.clear()
        self._last_paired = [None, None]
        self._apart.clear()
        for recent in self._recent:  # the other camera's jump is the same one
            recent.clear()
        direction = "ahead" if change > 0 else "back"
        self._on_jump(f"time jumped {direction} by {abs(change) / 1e9:.1f} s: starting anew")

    def _paired(self, left: Arrived, right: Arrived) -> None:
        # What is older than a pair is not waited for: pairs go on in order.
        for side, arrived in enumerate((left, right)):
            queue, stamp = self._sync.queues[side], stamp_ns(arrived)
            for older in [s for s in queue if s < stamp]:
                del queue[older]
            self._last_paired[side] = stamp
        self._accounts.paired()
        self._count = [0, 0]
        self._apart.append(right.came - left.came)
        self._on_pair(left.image, right.image)

    def missing_infos(self) -> str:
        """On which topics no camera_info has come, and what is there instead; empty if all came."""
        needed = [f"{SIDES[side]}/camera_info" for side in self._infos.needed()]
        words = " and ".join(map(self.topics.missing_info, needed))
        if len(needed) == 1 and not self._infos.raw:
            words += "; if you set baseline, the other camera's is enough"
        return words

    def clock_problem(self) -> str:
        """A sentence if the images of pairs do not arrive together; empty if they do."""
        frame = period([stamp for stamp, _ in self._recent[0]])
        if len(self._apart) < RECENT // 2 or frame is None:
            return ""
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
        """The likeliest reason, in a sentence, why there were no pairs lately."""
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
        """How far the stamps are apart (nanoseconds, right ahead of left), and what to do."""
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
