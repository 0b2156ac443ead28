"""Where every image ended: each received one is processed, dropped for one reason, or waiting."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

REASONS = {
    "unpaired": "no partner came",
    "replaced": "a newer pair came before this one's turn",
    "bad": "the image or its stamp cannot be used",
    "late": "a newer pair had gone on when it came",
    "uncalibrated": "raw images without a camera_info that can be used",
    "failed": "the engine failed",
    "stopped": "the node was deactivated or shut down",
}


class Accounts:
    """Counters of images. Written by the executor's and the worker's thread.

    Args:
        waiting: how many images wait in the synchroniser for their partner; what it gave up is
            the rest, whatever its rules are.
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
        """An image came in, and goes on to the synchroniser unless it is refused for a reason."""
        with self._lock:
            self._received += 1
            if refused is not None:
                self._refused[refused] += 1

    def paired(self) -> None:
        """Two images found each other."""
        with self._lock:
            self._paired += 2

    def processed(self) -> None:
        """A pair's features were published."""
        with self._lock:
            self._processed += 2

    def dropped(self, reason: str) -> None:
        """A pair was dropped for one of `REASONS`."""
        with self._lock:
            self._dropped[reason] += 2

    def snapshot(self) -> dict[str, int]:
        """Counters at one moment, taken in the executor's thread.

        received = processed + dropped + waiting; `waiting` are images that wait for a partner or
        for the worker, or are with it.
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
