"""Image counters: each received image is processed, dropped for one reason, or waiting."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

REASONS = {
    "unpaired": "no partner arrived",
    "replaced": "a newer pair arrived before this one was processed",
    "bad": "the image or its time stamp is invalid",
    "late": "the image arrived after a newer pair",
    "uncalibrated": "raw images without a usable camera_info",
    "failed": "the engine failed",
    "stopped": "the node was deactivated or shut down",
}


class ImageCounters:
    """Counters of images. Written by the executor's and the worker's thread.

    Args:
        waiting: returns the number of images that wait in the synchroniser. The images that the
            synchroniser dropped are computed from this, so its rules need not be known here.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._lock = threading.Lock()
        self._waiting = waiting
        self._received = 0
        self._paired = 0
        self._refused: Counter[str] = Counter()  # before synchronisation
        self._dropped: Counter[str] = Counter()  # after it
        self._processed = 0

    def received(self, refused: str | None = None) -> None:
        """Count an image. Without a reason to refuse it, the synchroniser gets it next."""
        with self._lock:
            self._received += 1
            if refused is not None:
                self._refused[refused] += 1

    def paired(self) -> None:
        """Count a pair of images that the synchroniser has matched."""
        with self._lock:
            self._paired += 2

    def processed(self) -> None:
        """Count a pair whose features were published."""
        with self._lock:
            self._processed += 2

    @property
    def pairs_processed(self) -> int:
        """Number of pairs whose features were published."""
        return self._processed // 2

    def dropped(self, reason: str) -> None:
        """Count a pair that is dropped for one of `REASONS`."""
        with self._lock:
            self._dropped[reason] += 2

    def snapshot(self) -> dict[str, int]:
        """The counters at one moment. Called in the executor's thread.

        received = processed + dropped + waiting. `waiting` counts images that wait for a partner or
        for the worker, and those that the worker processes.
        """
        with self._lock:
            reasons = self._refused + self._dropped
            in_queues = self._waiting()
            reasons["unpaired"] += self._received - self._refused.total() - self._paired - in_queues
            dropped = reasons.total()
            return {
                "received": self._received,
                "processed": self._processed,
                "dropped": dropped,
                **{f"dropped_{reason}": reasons[reason] for reason in REASONS},
                "waiting": self._received - self._processed - dropped,
            }
