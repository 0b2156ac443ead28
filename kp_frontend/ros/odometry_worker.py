"""Worker of the odometry node: runs the odometry on the newest features and counts messages."""

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
    "replaced": "newer features arrived before this message was processed",
    "malformed": "the array lengths of the message are inconsistent, or it has no time stamp",
    "old": "its time stamp is not newer than the last one",
    "unplaced": "TF has no pose of the camera",
    "failed": "an error occurred, see the log",
    "stopped": "the node was shut down",
}
NEWEST = 300  # number of newest estimates for the statistics


@dataclass(frozen=True)
class Report:
    """A snapshot for the diagnostics: counters, statistics and the status of the last estimate.

    `dropped` is the reason why the last message was dropped, empty if it was processed.
    """

    counts: dict[str, int]
    figures: dict[str, float]
    status: Status | None
    reason: str
    lost_for: float  # seconds since the motion was last known, 0 while it is known
    silent_for: float  # seconds since the last message
    dropped: str = ""


class OdometryWorker:
    """Runs the odometry on the newest message in a separate thread.

    received = processed + dropped + waiting. `missed` counts messages that did not arrive, by
    their sequence numbers.

    Args:
        publish: called with each estimate and the message that it was computed from.
        say: called with each warning.
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
        self._restarts = self._restarts_known = 0  # of the front end: seen, and told the odometry
        self._last: OdometryEstimate | None = None
        self._dropped = ""
        self._told = self._came = time.monotonic()
        self._reset = False
        self._thread = NewestWins("odometry", self._work, lambda _: self._count("replaced"))

    def put(self, message: StereoFeaturesMsg) -> None:
        """Accept a message. Called in the executor's thread."""
        self._came = time.monotonic()
        self._count("received")
        before, self._sequence = self._sequence, message.sequence
        if before is not None and message.sequence > before + 1:
            self._count("missed", message.sequence - before - 1)
        elif before is not None and message.sequence <= before:
            self._count("restarts")
            self._restarts += 1
            self._say(
                f"sequence went back from {before} to {message.sequence}: "
                "the front end restarted, or there are two publishers"
            )
        self._thread.put((self._restarts, message))

    def reset(self) -> None:
        """Restart at the origin with the next message."""
        self._reset = True

    def stop(self) -> None:
        """End the thread after its current message."""
        if self._thread.stop() is not None:
            self._count("stopped")

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def _work(self, item: tuple[int, StereoFeaturesMsg]) -> None:
        begin = time.monotonic()
        restarts, message = item
        if restarts != self._restarts_known:
            self._restarts_known = restarts
            self._odometry.forget_tracks()
        try:
            estimate = self._estimate(message)
            self._publish(estimate, message)
        except NoTransform as error:
            self._drop("unplaced", str(error))
        except RCLError as error:  # the context was shut down meanwhile
            self._drop("stopped", str(error))
        except _Dropped as error:
            self._drop(error.reason, str(error))
        except Exception as error:  # an error with one message must not end the thread
            self._drop("failed", f"{type(error).__name__}: {error}")
        else:
            self._count("processed")
            self._dropped = ""
            with self._lock:
                took = 1e3 * (time.monotonic() - begin)
                self._times.append((took, estimate.inliers, len(estimate.landmarks)))

    def _drop(self, reason: str, words: str) -> None:
        self._count(reason)
        self._dropped = words
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
        """A snapshot for the diagnostics. Called in the executor's thread."""
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
                "disparity_offset_px": round(self._odometry.offset.value, 3),
                "disparity_offset_sigma_px": round(self._odometry.offset.sigma, 3),
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
            self._dropped,
        )


class _Dropped(ValueError):
    """A message is dropped for one of `REASONS`."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason
