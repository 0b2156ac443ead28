"""Reads bags of ROS 1 and ROS 2 as far as possible, and notes what is missing.

Nothing of ROS runs here; messages are the plain objects that `rosbags` makes of serialised bytes.
"""

from __future__ import annotations

import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import zstandard
from rosbags.typesys import TypesysError, get_types_from_idl, get_types_from_msg
from rosbags.typesys.store import Typestore

from kp_frontend.ros.environment import typestore
from kp_training.evaluation.bags.files import METADATA, ZSTD_MAGIC, find_files, open_file
from kp_training.evaluation.bags.storage import (
    READABLE,
    Channel,
    StorageError,
    StorageFile,
    reason_of,
)

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
DISPARITY = "stereo_msgs/msg/DisparityImage"
POSE = "geometry_msgs/msg/PoseStamped"
POSES = (
    POSE,
    "geometry_msgs/msg/PoseWithCovarianceStamped",
    "nav_msgs/msg/Odometry",
    "geometry_msgs/msg/TransformStamped",
)
FEATURES = "kp_msgs/msg/StereoFeatures"

Message = Any  # an object of rosbags with the fields of its ROS message type

SHOWN = 3  # notes in an error; all are in the results
PARSED = ("ros2msg", "ros2idl")
# What a broken message or definition makes rosbags raise.
BROKEN = (
    TypesysError, struct.error, zstandard.ZstdError, AssertionError, LookupError, TypeError,
    ValueError, AttributeError, OverflowError, MemoryError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class Topic:
    """A topic of a bag."""

    name: str
    type: str  # empty if the bag does not say
    count: int
    reliability: str  # as it was offered, "unknown" where the bag does not say
    encoding: str = "cdr"  # of its messages

    @property
    def readable(self) -> bool:
        """Whether its messages are serialised by ROS."""
        return self.encoding in READABLE


_own_types = lru_cache(maxsize=1)(typestore)  # making one takes longer than opening a bag


@lru_cache(maxsize=64)
def _parsed(kind: str, form: str, text: str) -> Typestore:
    """The types in the definition of a message type."""
    store = Typestore()
    store.register(
        get_types_from_msg(text, kind) if form == "ros2msg" else get_types_from_idl(text)
    )
    return store


class Bag:
    """An open bag: a folder of ROS 2, a .mcap or .db3 file, a ROS 1 .bag. A context manager.

    `notes` lists what cannot be read and what is unusual. Reading messages can add notes.

    Raises:
        ValueError: it is missing, or nothing of it can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self._stores: dict[str, Typestore] = {}
        self._own = _own_types()
        self._files: list[StorageFile] = []
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        with ExitStack() as stack:
            try:
                found = find_files(path, self.note)
                reasons = self._open(found.paths, stack)
            except (StorageError, OSError) as error:
                raise ValueError(f"{path} cannot be read as a bag: {error}") from error
            if not self._files:
                raise ValueError(f"{path} cannot be read as a bag: {'; '.join(reasons)}")
            self._stack = stack.pop_all()
        for reason in reasons:
            self.note(f"a file is left out: {reason}")
        self._channels: dict[str, list[Channel]] = {}
        for file in self._files:
            for channel in file.channels:
                self._channels.setdefault(channel.topic, []).append(channel)
        self.topics = {name: self._topic(name) for name in sorted(self._channels)}
        self._expected = Counter({name: t.count for name, t in self.topics.items()}) | found.counts

    def _open(self, paths: list[Path], stack: ExitStack) -> list[str]:
        """Open all files. Returns the reasons why some cannot be opened."""
        reasons = []
        for path in paths:
            try:
                self._files.append(open_file(path, self.note, stack))
            except (StorageError, OSError) as error:
                reasons.append(str(error))
        return reasons

    def note(self, text: str) -> None:
        """Add a note for the user, once."""
        if text not in self.notes:
            self.notes.append(text)

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _topic(self, name: str) -> Topic:
        """A topic by its channels; of several types the one with the most messages is read."""
        channels = self._channels[name]
        counts: Counter[tuple[bool, str]] = Counter()
        for channel in channels:
            counts[channel.encoding in READABLE, channel.type] += channel.count
        readable, kind = max(counts, key=lambda key: (key[0], counts[key]))
        same = [c for c in channels if (c.encoding in READABLE, c.type) == (readable, kind)]
        offered = (c.reliability for c in same if c.reliability != "unknown")
        count = counts[readable, kind]
        return Topic(name, kind, count, next(offered, "unknown"), same[0].encoding)

    @property
    def duration(self) -> float:
        """Seconds from the first message to the last."""
        times = [(f.start, f.end) for f in self._files if f.end]
        return (max(e for _, e in times) - min(s for s, _ in times)) / 1e9 if times else 0.0

    @property
    def start(self) -> int:
        """When the first message was recorded, nanoseconds."""
        return min((f.start for f in self._files if f.end), default=0)

    @property
    def count(self) -> int:
        """Number of messages."""
        return sum(topic.count for topic in self.topics.values())

    def messages(self, topics: Iterable[str]) -> Iterator[tuple[str, int, bytes]]:
        """Messages of some topics in the order of recording: topic, nanoseconds, serialised (CDR).

        At the end the number of messages is compared with the statistics of the bag. Missing
        messages are noted.
        """
        wanted = [self.topics[name] for name in dict.fromkeys(topics) if name in self.topics]
        channels = {c for topic in wanted for c in self._read_channels(topic)}
        seen: Counter[str] = Counter()
        for file in self._files:
            for channel, time, raw in file.messages([c for c in file.channels if c in channels]):
                seen[channel.topic] += 1
                try:
                    message = self._as_cdr(channel, raw)
                except BROKEN as error:
                    self.note(f"a message of {channel.topic} cannot be decoded: {reason_of(error)}")
                    continue
                yield channel.topic, time, message
        for topic in wanted:
            self._note_missing(topic.name, seen[topic.name])

    def note_missing(self) -> None:
        """Note the topics of which the files have fewer messages than metadata.yaml counts."""
        for name in sorted(self._expected):
            self._note_missing(name, self.topics[name].count if name in self.topics else 0)

    def _note_missing(self, name: str, found: int) -> None:
        expected = self._expected[name]
        if (missing := expected - found) > 0:
            self.note(f"{missing} of {expected} messages of {name} are missing")

    def _read_channels(self, topic: Topic) -> list[Channel]:
        """The channels of a topic that are read; those of another type are noted."""
        channels = self._channels[topic.name]
        read = [c for c in channels if c.type == topic.type and c.encoding in READABLE]
        for other in channels:
            if other not in read:
                self.note(
                    f"{topic.name} also has {other.count} messages of type "
                    f"{other.type or 'unknown'} ({other.encoding}), which are left out"
                )
        return read

    def _as_cdr(self, channel: Channel, raw: bytes) -> bytes:
        """A message as ROS 2 serialises it, not compressed."""
        if raw.startswith(ZSTD_MAGIC):
            unpacker = zstandard.ZstdDecompressor().decompressobj()
            raw = unpacker.decompress(raw)
            if not unpacker.eof:
                raise ValueError("its compressed data is cut")
        if channel.encoding == "ros1":
            raw = bytes(self._own.ros1_to_cdr(raw, channel.type))
        return raw

    def read(self, topic: str, raw: bytes) -> Message:
        """The message in serialised bytes of a topic.

        Raises:
            ValueError: they are no such message.
        """
        kind = self.topics[topic].type
        if kind not in self._stores:
            self._stores[kind] = self._store(self.topics[topic])
        try:
            return self._stores[kind].deserialize_cdr(raw, kind)
        except BROKEN as error:
            reason = reason_of(error) if str(error) else "its length does not fit"
            raise ValueError(f"a message of {topic} is no {kind}: {reason}") from error

    def _store(self, topic: Topic) -> Typestore:
        """The definition of a topic's type: the bag's own, else that of ROS 2 Jazzy or ours.

        Raises:
            ValueError: there is none, or the bag's own lacks fields that are needed.
        """
        ours = self._own.fielddefs.get(topic.type)
        channels = self._read_channels(topic)
        texts = {(c.definition_format, c.definition) for c in channels if c.encoding == "cdr"}
        for form, text in sorted(texts):
            if form not in PARSED or not text.strip():
                continue
            try:
                store = _parsed(topic.type, form, text)
                store.fielddefs[topic.type]
            except BROKEN as error:
                why = reason_of(error)
                self.note(f"the definition of {topic.type} in the bag cannot be parsed: {why}")
                continue
            for kind, (_, fields) in store.fielddefs.items():  # the type, and those in it
                if kind.startswith("kp_msgs/"):
                    continue  # older versions are read, see kp_frontend.ros.messages
                _, known = self._own.fielddefs.get(kind, ((), ()))
                if lacking := [name for name, of in known if (name, of) not in fields]:
                    raise ValueError(
                        f"the definition of {kind} in the bag has no {', '.join(lacking)} as ROS 2 "
                        "Jazzy defines it: it was recorded with another version"
                    )
            return store
        if ours is None:
            raise ValueError(f"the bag has no definition of {topic.type} that can be parsed")
        return self._own

    def require(self, topic: str, *types: str) -> Topic:
        """A topic by name.

        Raises:
            ValueError: it is not there (the words list those that are), or of another type.
        """
        if topic not in self.topics:
            raise ValueError(f"{self.path} has no topic {topic}; it has {self.listing()}")
        found = self.topics[topic]
        if found.type not in types:
            raise ValueError(
                f"{topic} is {found.type or 'of no type'}, not {' or '.join(types)}; "
                f"{self.path} has {self.listing()}"
            )
        if not found.readable:
            raise ValueError(f"the messages of {topic} are {found.encoding}, not CDR")
        return found

    def of_type(self, *types: str) -> list[str]:
        """Names of the topics of some types that can be read."""
        return [t.name for t in self.topics.values() if t.type in types and t.readable]

    def listing(self) -> str:
        """Its topics, and what is missing, for a message to the user."""
        named = (f"{t.name} ({t.type or t.encoding})" for t in self.topics.values())
        return (", ".join(named) or "no topics") + self.noted()

    def noted(self) -> str:
        """The notes for the end of a message to the user, the first of them in full."""
        more = len(self.notes) - SHOWN
        shown = [note if len(note) < 200 else f"{note[:200]} ..." for note in self.notes[:SHOWN]]
        if more > 0:
            shown.append(f"{more} more, see `kp bag info`")
        return "".join(f"; {note}" for note in shown)


def stamp_of(raw: bytes) -> int:
    """Stamp in nanoseconds of a serialised message that begins with a header.

    Raises:
        ValueError: too short.
    """
    if len(raw) < 12:
        raise ValueError(f"a message of {len(raw)} bytes has no header")
    seconds, nanoseconds = struct.unpack_from("<iI" if raw[1] else ">iI", raw, 4)
    return seconds * 1_000_000_000 + nanoseconds


def storage_of(path: Path) -> str:
    """The storage that a bag's name asks for: `sqlite3` for .db3, else `mcap`."""
    return "sqlite3" if path.suffix == ".db3" else "mcap"


def remove_bag(path: Path) -> None:
    """Remove a bag that an earlier run wrote, so that another takes its place.

    Raises:
        ValueError: something is there that is no rosbag2 folder.
    """
    if not path.exists():
        return
    if not (path / METADATA).is_file():
        raise ValueError(f"{path} exists and is no bag's folder: remove it, or choose another name")
    shutil.rmtree(path)
