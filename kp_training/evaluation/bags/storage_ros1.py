"""ROS 1 bags; their messages are handed out as ROS 2 serialises them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from rosbags.rosbag1 import Reader, ReaderError

from kp_training.evaluation.bags.storage import Channel, Note, StorageError, reason_of, ros2_type

MAGIC = b"#ROSBAG V2.0"
# What damaged records and compressed data make the reader raise.
DAMAGED = (
    ReaderError, AssertionError, IndexError, KeyError, TypeError, ValueError, RuntimeError, OSError,
    EOFError, MemoryError,
)  # fmt: skip


class Ros1File:
    """An open ROS 1 bag.

    Raises:
        StorageError: it cannot be read.
    """

    def __init__(self, path: Path, note: Note) -> None:
        self.path, self._note = path, note
        self._reader = Reader(path)
        try:
            self._reader.open()
            self._of = {
                Channel(c.topic, ros2_type(c.msgtype), "ros1", count=c.msgcount): c
                for c in self._reader.connections
            }
            empty = not self._reader.message_count
            self.start = 0 if empty else self._reader.start_time
            self.end = 0 if empty else self._reader.end_time - 1
        except DAMAGED as error:
            raise StorageError(
                f"{path.name} cannot be read as a ROS 1 bag: {reason_of(error)}; `rosbag reindex` "
                "mends one that was not closed"
            ) from error

    @property
    def channels(self) -> list[Channel]:
        """All channels, those of a topic may be several."""
        return list(self._of)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def messages(self, wanted: Collection[Channel]) -> Iterator[tuple[Channel, int, bytes]]:
        """Messages of some channels in the order of recording, in ROS 1's serialisation."""
        connections = {self._of[c].id: c for c in self.channels if c in wanted}
        if not connections:
            return
        chosen = [c for c in self._reader.connections if c.id in connections]
        messages = self._reader.messages(chosen)
        read = 0
        while True:
            try:
                connection, time, raw = next(messages)
            except StopIteration:
                return
            except DAMAGED as error:
                self._note(
                    f"{self.path.name}: reading ends after {read} messages: {reason_of(error)}"
                )
                return
            read += 1
            yield connections[connection.id], time, bytes(raw)
