"""What the node uses of ROS 2's `message_filters`, with the same interface and behaviour."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rclpy.clock import ROSClock
from rclpy.duration import Duration
from rclpy.logging import get_logger
from rclpy.time import Time


class SimpleFilter:
    """Hands each message on to its callbacks."""

    def __init__(self) -> None:
        self.callbacks: dict[int, tuple[Callable[..., None], tuple[Any, ...]]] = {}

    def registerCallback(self, cb: Callable[..., None], *args: Any) -> int:
        """Call `cb(*messages, *args)` for each message; returns a number that names it."""
        number = len(self.callbacks)
        self.callbacks[number] = (cb, args)
        return number

    def signalMessage(self, *messages: Any) -> None:
        """Call all callbacks."""
        for callback, args in self.callbacks.values():
            callback(*messages, *args)


class TimeSynchronizer(SimpleFilter):
    """Brings messages of several filters with equal stamps together.

    Each filter's newest `queue_size` messages wait for their partners; the one with the oldest
    stamp is given up first, even if it is the newest to arrive.
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
        stamp = self._stamp(message)
        queue[stamp] = message
        while len(queue) > self.queue_size:
            del queue[min(queue)]
        return stamp

    def _stamp(self, message: Any) -> int:
        return Time.from_msg(message.header.stamp).nanoseconds

    def _signal(self, stamps: Sequence[int]) -> None:
        self.signalMessage(
            *(queue.pop(stamp) for queue, stamp in zip(self.queues, stamps, strict=True))
        )


class ApproximateTimeSynchronizer(TimeSynchronizer):
    """Brings messages together whose stamps differ by less than `slop` seconds, nearest first.

    A message without a header is dropped with a warning, or with `allow_headerless` takes the
    time of its arrival as its stamp.
    """

    def __init__(
        self,
        fs: Sequence[SimpleFilter],
        queue_size: int,
        slop: float,
        allow_headerless: bool = False,
    ) -> None:
        super().__init__(fs, queue_size)
        self.slop = Duration(seconds=slop)
        self.allow_headerless = allow_headerless

    def add(self, message: Any, queue: dict[int, Any]) -> None:
        """Take a message of one filter; signals the nearest set that it completes.

        Of several sets that of the nearest message in the first filter goes, then in the second
        and so on. Only the new message's partners count: the rest was looked at when it came.
        """
        if not hasattr(getattr(message, "header", None), "stamp") and not self.allow_headerless:
            get_logger("message_filters_approx").warning(
                f"dropped a {type(message).__name__}: it has no stamp and allow_headerless is off"
            )
            return
        slop = self.slop.nanoseconds
        with self.lock:
            stamp = self._store(message, queue)
            if stamp not in queue:  # older than all that wait in a full queue
                return
            near = [
                [stamp] if other is queue else sorted(other, key=lambda s: abs(s - stamp))
                for other in self.queues
            ]
            near = [[s for s in stamps if abs(s - stamp) < slop] for stamps in near]
            for stamps in itertools.product(*near):
                if max(stamps) - min(stamps) < slop:
                    self._signal(stamps)
                    return

    def _stamp(self, message: Any) -> int:
        if not hasattr(getattr(message, "header", None), "stamp"):
            return ROSClock().now().nanoseconds
        stamp = message.header.stamp
        return stamp.nanoseconds if isinstance(stamp, Time) else super()._stamp(message)
