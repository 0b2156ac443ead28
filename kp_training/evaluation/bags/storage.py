"""Common parts of the storage formats of bags: channels, and records that may be truncated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

READABLE = ("cdr", "ros1")  # encodings of messages that can be read; others are listed only


class StorageError(ValueError):
    """A file cannot be read at all. The message gives the reason."""


@dataclass(eq=False)
class Channel:
    """The messages of one publisher in one file; several may have the same topic.

    `type` is the message type as ROS 2 writes it (`sensor_msgs/msg/Image`), empty if the file does
    not say. `count` is the number of messages by the file's own statistics.
    """

    topic: str
    type: str
    encoding: str
    definition: str = ""
    definition_format: str = ""  # ros2msg, ros2idl, or another that is not read
    reliability: str = "unknown"  # as it was offered
    count: int = 0


class StorageFile(Protocol):
    """One open file of a bag.

    `start` and `end` are when the first and the last message were recorded, nanoseconds.
    """

    start: int
    end: int

    @property
    def channels(self) -> list[Channel]:
        """The channels of the file."""

    def messages(self, wanted: Collection[Channel]) -> Iterator[tuple[Channel, int, bytes]]:
        """Messages of some channels: channel, time of recording in nanoseconds, serialised."""

    def close(self) -> None:
        """Close the file."""


# Opens a file. It calls `note` with each message for the user.
Note = Callable[[str], None]


def ros2_type(name: str) -> str:
    """A message type as ROS 2 writes it; ROS 1 leaves `msg` out."""
    package, slash, kind = name.partition("/")
    return f"{package}/msg/{kind}" if slash and "/" not in kind else name


def reason_of(error: Exception) -> str:
    """The message of an exception as one line of limited length."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 200 else f"{words[:200]} ..."
