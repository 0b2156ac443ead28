"""A worker thread with a queue of length one: a newer item replaces the one that waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class NewestWins(Generic[T]):
    """Calls `handle` for each item in a separate thread.

    Args:
        name: name of the thread.
        handle: processes an item. It must not raise.
        replaced: called with each item that a newer one replaces.
    """

    def __init__(
        self, name: str, handle: Callable[[T], None], replaced: Callable[[T], None] | None = None
    ) -> None:
        self._handle = handle
        self._replaced = replaced or (lambda _: None)
        self._item: T | None = None
        self._stopping = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def put(self, item: T) -> None:
        """Put an item into the queue. Replaces an item that waits there."""
        with self._news:
            before, self._item = self._item, item
            self._news.notify()
        if before is not None:
            self._replaced(before)

    def stop(self) -> T | None:
        """End the thread after its current item. Returns the item that still waits, if any."""
        with self._news:
            self._stopping = True
            left, self._item = self._item, None
            self._news.notify()
        self._thread.join()
        return left

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._item is not None or self._stopping)
                if self._stopping or self._item is None:
                    return
                item, self._item = self._item, None
            self._handle(item)
            del item  # do not keep its images in memory until the next item arrives
