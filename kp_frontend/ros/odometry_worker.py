"""The odometry node's worker: follows the newest features in a thread of its own, and counts."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from kp_msgs.msg import StereoFeatures as StereoFeaturesMsg

from kp_frontend.odometry import NOT_NEWER, OdometryEstimate, Status, StereoOdometry
from kp_frontend.ros.messages import stereo_features
from kp_frontend.ros.mount import NoTransform
from kp_frontend.ros.newest_wins import NewestWins
from kp_frontend.ros.rclpy_private import RCLError

REASONS = {
    "replaced": "newer features came before this message's turn",
    "malformed": "the arrays of the message do not fit each other, or it has no stamp",
    "old": "its time stamp is not newer than the last one's",
    "unplaced": "TF does not know where the camera is",
    "failed": "an error, see the log",
    "stopped": "the node was shut down",
}
NEWEST = 300  # estimates over which times are taken


@dataclass(frozen=True)
class Report:
    """What is known at one moment: counters, times, and how the newest estimate was got."""

    counts: dict[str, int]
    figures: dict[str, float]
    status: Status | None
    reason: str
    lost_for: float  # seconds since the motion was last told, 0 while it is
    silent_for: float  # seconds since the last message


class OdometryWorker:
    """Takes messages, follows the camera and hands the estimates on.

    received = processed + the dropped ones + waiting. `missed` counts messages that were sent and
    never came, by their sequence numbers.

    Args:
        publish: takes an estimate and the message that it was made of.
        say: takes warnings.
    """

    def __init__(
        self,
        odometry: StereoOdometry,
        publish: Callable[[OdometryEstimate, StereoFeaturesMsg], None],
        say: Callable[[str], None],
    ) -> None:
        self._odometry, self._publish, self._say = odometry, publish, say
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._times: deque[tuple[float, int, int]] = deque(maxlen=NEWEST)
        self._sequence: int | None = None
        self._last: OdometryEstimate | None = None
        self._told = self._came = time.monotonic()
        self._reset = False
        self._thread = NewestWins("odometry", self._work, lambda _: self._count("replaced"))

    def put(self, message: StereoFeaturesMsg) -> None:
        """Take a message; called in the executor's thread."""
        self._came = time.monotonic()
        self._count("received")
        before, self._sequence = self._sequence, message.sequence
        if before is not None and message.sequence > before + 1:
            self._count("missed", message.sequence - before - 1)
        elif before is not None and message.sequence <= before:
            self._count("restarts")
            self._say(f"sequence goes back from {before} to {message.sequence}: another sender?")
        self._thread.put(message)

    def reset(self) -> None:
        """Begin at the origin with the next message."""
        self._reset = True

    def stop(self) -> None:
        """End the thread after the message that it has in hand."""
        if self._thread.stop() is not None:
            self._count("stopped")

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def _work(self, message: StereoFeaturesMsg) -> None:
        begin = time.monotonic()
        try:
            estimate = self._estimate(message)
            self._publish(estimate, message)
        except NoTransform as error:
            self._drop("unplaced", str(error))
        except RCLError as error:  # the context ended meanwhile
            self._drop("stopped", str(error))
        except _Dropped as error:
            self._drop(error.reason, str(error))
        except Exception as error:  # nothing that one message does may end the thread
            self._drop("failed", f"{type(error).__name__}: {error}")
        else:
            self._count("processed")
            with self._lock:
                took = 1e3 * (time.monotonic() - begin)
                self._times.append((took, estimate.inliers, len(estimate.landmarks)))

    def _drop(self, reason: str, words: str) -> None:
        self._count(reason)
        self._say(f"features dropped: {words}")

    def _estimate(self, message: StereoFeaturesMsg) -> OdometryEstimate:
        if self._reset:
            self._reset = False
            self._odometry.reset()
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        try:
            if stamp <= 0:
                raise ValueError("the message has no time stamp")
            features = stereo_features(message)
        except ValueError as error:
            raise _Dropped("malformed", str(error)) from error
        estimate = self._odometry(features, stamp)
        if estimate.reason == NOT_NEWER:
            raise _Dropped("old", estimate.reason)
        if estimate.status in (Status.TRACKING, Status.STARTED):
            self._told = time.monotonic()
        news = self._last is None or estimate.reason != self._last.reason
        if news and estimate.reason:
            self._say(f"{estimate.status.value}: {estimate.reason}")
        self._last = estimate
        return estimate

    def report(self) -> Report:
        """Everything that the diagnostics say; called in the executor's thread."""
        now = time.monotonic()
        with self._lock:
            counts, times = Counter(self._counts), list(self._times)
        dropped = sum(counts[reason] for reason in REASONS)
        named = {
            "received": counts["received"],
            "processed": counts["processed"],
            "dropped": dropped,
            **{f"dropped_{reason}": counts[reason] for reason in REASONS},
            "waiting": counts["received"] - counts["processed"] - dropped,
            "missed": counts["missed"],
            "restarts": counts["restarts"],
            **{name.replace(" ", "_"): n for name, n in self._odometry.counts.items()},
        }
        figures = {}
        if times:
            took, inliers, landmarks = (np.array(column) for column in zip(*times, strict=True))
            figures = {
                "latency_ms_p50": round(float(np.median(took)), 2),
                "latency_ms_p95": round(float(np.percentile(took, 95)), 2),
                "latency_ms_max": round(float(took.max()), 2),
                "inliers": float(np.median(inliers)),
                "landmarks": float(np.median(landmarks)),
            }
        last = self._last
        lost = last is not None and last.status not in (Status.TRACKING, Status.STARTED)
        return Report(
            named,
            figures,
            last.status if last else None,
            last.reason if last else "",
            now - self._told if lost else 0.0,
            now - self._came,
        )


class _Dropped(ValueError):
    """A message that goes no further, for one of `REASONS`."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason
