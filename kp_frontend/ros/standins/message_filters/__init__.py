"""What the node uses of ROS 2's `message_filters`, with the same interface and behaviour."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.time import Time


class SimpleFilter:
    """Hands each message on to its callbacks."""

    def __init__(self) -> None:
        self.callbacks: dict[int, tuple[Callable[..., None], tuple[Any, ...]]] = {}

    def registerCallback(self, callback: Callable[..., None], *args: Any) -> int:
        """Call `callback(*messages, *args)` for each message; returns a number that names it."""
        number = len(self.callbacks)
        self.callbacks[number] = (callback, args)
        return number

    def signalMessage(self, *messages: Any) -> None:
        """Call all callbacks."""
        for callback, args in self.callbacks.values():
            callback(*messages, *args)


class Subscriber(SimpleFilter):
    """A subscription that is the source of a chain of filters."""

    def __init__(
        self,
        node: Node,
        msg_type: type,
        topic: str,
        qos_profile: QoSProfile | int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.node, self.topic = node, topic
        self.sub = node.create_subscription(
            msg_type, topic, self.signalMessage, qos_profile, **kwargs
        )

    def getTopic(self) -> str:
        """The topic as it was asked for."""
        return self.topic


class TimeSynchronizer(SimpleFilter):
    """Brings messages of several filters with equal stamps together.

    Each filter's newest `queue_size` messages wait for their partners; the one with the oldest
    stamp goes first.
    """

    def __init__(self, fs: Sequence[SimpleFilter], queue_size: int) -> None:
        super().__init__()
        self.queue_size = queue_size
        self.lock = threading.Lock()
        self.queues: list[dict[int, Any]] = [{} for _ in fs]
        for queue, source in zip(self.queues, fs, strict=True):
            source.registerCallback(self.add, queue)

    def add(self, message: Any, queue: dict[int, Any]) -> None:
        """Take a message of one filter; signals every set that is complete."""
        with self.lock:
            stamp = self._store(message, queue)
            if all(stamp in other for other in self.queues):
                self._signal([stamp] * len(self.queues))

    def _store(self, message: Any, queue: dict[int, Any]) -> int:
        stamp = Time.from_msg(message.header.stamp).nanoseconds
        queue[stamp] = message
        while len(queue) > self.queue_size:
            del queue[min(queue)]
        return stamp

    def _signal(self, stamps: Sequence[int]) -> None:
        self.signalMessage(
            *(queue.pop(stamp) for queue, stamp in zip(self.queues, stamps, strict=True))
        )


class ApproximateTimeSynchronizer(TimeSynchronizer):
    """Brings messages together whose stamps differ by at most `slop` seconds, nearest first."""

    def __init__(
        self,
        fs: Sequence[SimpleFilter],
        queue_size: int,
        slop: float,
        allow_headerless: bool = False,
    ) -> None:
        if allow_headerless:
            raise ValueError("messages without a header cannot be synchronised here")
        super().__init__(fs, queue_size)
        self.slop = round(slop * 1e9)

    def add(self, message: Any, queue: dict[int, Any]) -> None:
        """Take a message of one filter; signals the nearest set that it completes."""
        with self.lock:
            stamp = self._store(message, queue)
            near = [
                [stamp] if other is queue else [s for s in other if abs(s - stamp) <= self.slop]
                for other in self.queues
            ]
            sets = [s for s in itertools.product(*near) if max(s) - min(s) <= self.slop]
            if stamp in queue and sets:
                self._signal(min(sets, key=lambda s: sum(abs(t - stamp) for t in s)))
