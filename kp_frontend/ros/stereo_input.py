"""The stereo camera as the node sees it: subscriptions, pairs, time that jumps, silence explained.

Everything here runs in the executor's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image

from kp_frontend.ros import standins
from kp_frontend.ros.accounts import Accounts
from kp_frontend.ros.camera_infos import CameraInfos
from kp_frontend.ros.messages import stamp_ns
from kp_frontend.ros.parameters import NodeConfig

standins.put_on_path()
import message_filters  # noqa: E402  the real one, or ours where it is missing

SIDES = ("left", "right")
JUMP_BACK = 500_000_000  # ns; a stamp so much before its camera's last one: time itself went back
JUMP_AHEAD = 10_000_000_000  # ns; so much after it: nothing of before helps any more
RECENT = 20  # stamps of each camera that are remembered to explain silence


class StereoInput:
    """Subscribes to both cameras and hands on the pairs, in the order of time.

    Args:
        on_pair: called with each pair; must not raise, the synchroniser would stay locked.
        on_jump: called, with words, when time jumped and all that waited was given up.
        on_bad: called with words for an image that is refused.
    """

    def __init__(
        self,
        node: LifecycleNode,
        config: NodeConfig,
        accounts: Accounts,
        infos: CameraInfos,
        on_pair: Callable[[Image, Image], None],
        on_jump: Callable[[str], None],
        on_bad: Callable[[str], None],
    ) -> None:
        self._node, self._config, self._accounts, self._infos = node, config, accounts, infos
        self._on_pair, self._on_jump, self._on_bad = on_pair, on_jump, on_bad
        self._recent = tuple(deque[int](maxlen=RECENT) for _ in SIDES)
        self._last_paired: list[int | None] = [None, None]
        self._incompatible: dict[str, str] = {}  # topics whose publishers offer another QoS
        self._count = [0, 0]  # images that came since the last pair
        reliability = (
            ReliabilityPolicy.RELIABLE if config.reliable else ReliabilityPolicy.BEST_EFFORT
        )
        self._qos = QoSProfile(depth=config.queue_size, reliability=reliability)
        self._subscribers: list[message_filters.Subscriber] = []
        gates = []
        for side, name in enumerate(SIDES):
            # Infos first: one that comes with its image is then there before it.
            self._subscribe(CameraInfo, f"{name}/camera_info", partial(infos.add, side))
            gate = message_filters.SimpleFilter()
            self._subscribe(Image, f"{name}/image", partial(self._on_image, side, gate))
            gates.append(gate)
        if config.approximate_sync:
            self._sync = message_filters.ApproximateTimeSynchronizer(
                gates, config.queue_size, config.sync_slop
            )
        else:
            self._sync = message_filters.TimeSynchronizer(gates, config.queue_size)
        self._sync.registerCallback(self._paired)

    def _subscribe(self, kind: type, topic: str, callback: Callable) -> None:
        events = SubscriptionEventCallbacks(
            incompatible_qos=lambda event: self._on_incompatible(topic, event)
        )
        subscriber = message_filters.Subscriber(
            self._node, kind, topic, qos_profile=self._qos, event_callbacks=events
        )
        subscriber.registerCallback(callback)
        self._subscribers.append(subscriber)

    def _on_incompatible(self, topic: str, event: object) -> None:
        asked = "reliable" if self._config.reliable else "best effort"
        name = self._node.resolve_topic_name(topic)
        words = f"{name} is published with a QoS that does not serve {asked} subscribers"
        if self._config.reliable:
            words += "; set reliable to false"
        self._incompatible[topic] = words
        self._node.get_logger().warning(words)

    def waiting(self) -> int:
        """Images that wait for their partner."""
        return sum(len(queue) for queue in self._sync.queues)

    def close(self) -> None:
        """End the subscriptions; what waited for a partner found none."""
        for subscriber in self._subscribers:
            self._node.destroy_subscription(subscriber.sub)
        self._give_up()

    def _give_up(self) -> None:
        for queue in self._sync.queues:
            queue.clear()

    def _on_image(self, side: int, gate: message_filters.SimpleFilter, image: Image) -> None:
        self._count[side] += 1
        stamp = stamp_ns(image)
        if image.header.stamp.sec < 0 or image.header.stamp.nanosec >= 1_000_000_000:
            # The synchroniser cannot take it.
            self._accounts.received(refused="bad")
            self._on_bad(f"image dropped: its stamp is no time, {image.header.stamp}")
            return
        self._watch_time(side, stamp)
        self._recent[side].append(stamp)
        last = self._last_paired[side]
        if last is not None and stamp <= last:
            self._accounts.received(refused="late")
            return
        self._accounts.received()
        gate.signalMessage(image)

    def _watch_time(self, side: int, stamp: int) -> None:
        """Start anew when a camera's stamps jump: a bag that loops, a clock that was set."""
        if not self._recent[side]:
            return
        change = stamp - self._recent[side][-1]
        if -JUMP_BACK < change < JUMP_AHEAD:
            return
        self._give_up()
        self._infos.clear()
        self._last_paired = [None, None]
        for recent in self._recent:  # the other camera's jump is the same one
            recent.clear()
        direction = "ahead" if change > 0 else "back"
        self._on_jump(f"time jumped {direction} by {abs(change) / 1e9:.1f} s: starting anew")

    def _paired(self, left: Image, right: Image) -> None:
        # What is older than a pair is not waited for: pairs go on in order.
        for side, image in enumerate((left, right)):
            queue, stamp = self._sync.queues[side], stamp_ns(image)
            for older in [s for s in queue if s < stamp]:
                del queue[older]
            self._last_paired[side] = stamp
        self._accounts.paired()
        self._count = [0, 0]
        self._on_pair(left, right)

    def missing_infos(self) -> list[str]:
        """Topics on which no camera_info has come."""
        return [
            self._node.resolve_topic_name(f"{SIDES[side]}/camera_info")
            for side in self._infos.missing()
        ]

    def why_no_pairs(self) -> str:
        """The likeliest reason, in words, why there were no pairs lately."""
        topics = [f"{name}/image" for name in SIDES]
        names = [self._node.resolve_topic_name(topic) for topic in topics]
        unpublished = [
            name
            for name, topic in zip(names, topics, strict=True)
            if not self._node.count_publishers(topic)
        ]
        if unpublished:
            return f"nobody publishes {' and '.join(unpublished)}"
        words = [self._incompatible[topic] for topic in topics if topic in self._incompatible]
        silent = [name for name, count in zip(names, self._count, strict=True) if not count]
        if silent:
            return "; ".join([f"no image comes on {' and '.join(silent)}", *words])
        new = [
            [stamp for stamp in recent if last is None or stamp > last]
            for recent, last in zip(self._recent, self._last_paired, strict=True)
        ]
        if not all(new):
            return "the images' stamps are no times, or older than the last pair's"
        apart = min(abs(a - b) for a in new[0] for b in new[1]) / 1e6
        if not self._config.approximate_sync:
            return (
                f"the cameras' stamps are {apart:.3f} ms apart and must be equal; if the cameras "
                "have clocks of their own, set approximate_sync"
            )
        slop = 1e3 * self._config.sync_slop
        return f"the cameras' stamps are {apart:.3f} ms apart, sync_slop allows {slop:.3f} ms"
