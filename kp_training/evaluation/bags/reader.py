"""Rosbag2 files: stereo sequences written as bags, bags of any stereo camera read.

`rosbags` reads and writes them, so nothing of ROS runs here; messages are its plain objects.
"""

from __future__ import annotations

import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
import zstandard
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.interfaces import Connection
from rosbags.rosbag2 import ReaderError
from rosbags.rosbag2.storage_mcap import MCAPFile

from kp_frontend.ros.environment import typestore

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
DISPARITY = "stereo_msgs/msg/DisparityImage"
POSE = "geometry_msgs/msg/PoseStamped"
FEATURES = "kp_msgs/msg/StereoFeatures"

# What a broken file makes the readers of MCAP, sqlite3, their compression and CDR raise.
BROKEN = (
    AnyReaderError, ReaderError, sqlite3.Error, zstandard.ZstdError, yaml.YAMLError, struct.error,
    AssertionError, IndexError, KeyError, TypeError, ValueError, RuntimeError, OSError, EOFError,
)  # fmt: skip


@dataclass(frozen=True)
class Topic:
    """A topic of a bag."""

    name: str
    type: str
    count: int
    reliability: str  # as it was offered, "unknown" where the bag does not say


class Bag:
    """An open bag: a rosbag2 folder, or a plain .mcap or .db3 file. A context manager.

    Args:
        ros1: take ROS 1's .bag files too; their serialised messages are not CDR.

    Raises:
        ValueError: it is missing or cannot be read; here, or later where a file is cut.
    """

    def __init__(self, path: Path, ros1: bool = False) -> None:
        self.path = path
        self._ros1 = ros1
        self._scratch: tempfile.TemporaryDirectory | None = None
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        try:
            self._reader = AnyReader([self._folder()], default_typestore=typestore())
            self._reader.open()
        except BROKEN as error:
            self._clean()
            raise self._broken(error) from error

    def _folder(self) -> Path:
        """A rosbag2 folder with what is to be read."""
        if self.path.is_dir():
            if not (self.path / "metadata.yaml").is_file():
                raise ReaderError("the folder has no metadata.yaml")
            for file in self.path.glob("*.db3"):
                _check_length(file)
            return self.path
        if self._ros1 and self.path.suffix == ".bag":
            return self.path
        readers = {".mcap": _mcap_topics, ".db3": _sqlite_topics}
        if self.path.suffix not in readers:
            raise ReaderError("a bag is a folder with metadata.yaml, a .mcap or a .db3 file")
        information = readers[self.path.suffix](self.path)
        self._scratch = tempfile.TemporaryDirectory(prefix="kp_bag_")
        folder = Path(self._scratch.name)
        (folder / self.path.name).symlink_to(self.path.resolve())
        information["relative_file_paths"] = [self.path.name]
        text = yaml.safe_dump({"rosbag2_bagfile_information": information})
        (folder / "metadata.yaml").write_text(text)
        return folder

    def _broken(self, error: Exception) -> ValueError:
        reason = str(error) or type(error).__name__
        return ValueError(f"{self.path} cannot be read as a bag: {' '.join(reason.split())}")

    def _clean(self) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._clean()

    @property
    def topics(self) -> dict[str, Topic]:
        """All topics by name, sorted."""
        found = sorted(self._reader.connections, key=lambda c: c.topic)
        return {c.topic: Topic(c.topic, c.msgtype, c.msgcount, _reliability(c)) for c in found}

    @property
    def duration(self) -> float:
        """Seconds from the first message to the last."""
        return max(0, self._reader.duration - 1) / 1e9

    @property
    def start(self) -> int:
        """When the first message was recorded, nanoseconds."""
        return self._reader.start_time

    @property
    def count(self) -> int:
        """Number of messages."""
        return self._reader.message_count

    def messages(self, topics: Iterable[str]) -> Iterator[tuple[str, int, bytes]]:
        """Messages of some topics in the order of recording: topic, nanoseconds, serialised.

        Raises:
            ValueError: the file is broken.
        """
        wanted = set(topics)
        messages = self._reader.messages([c for c in self._reader.connections if c.topic in wanted])
        while wanted:
            try:
                connection, time, raw = next(messages)
            except StopIteration:
                return
            except BROKEN as error:
                raise self._broken(error) from error
            yield connection.topic, time, raw

    def read(self, topic: str, raw: bytes) -> object:
        """The message in serialised bytes of a topic.

        Raises:
            ValueError: they are no such message.
        """
        kind = self.topics[topic].type
        try:
            return self._reader.deserialize(raw, kind)
        except (*BROKEN, UnicodeError) as error:
            raise ValueError(f"a message of {topic} is no {kind}: {error}") from error

    def require(self, topic: str, *types: str) -> Topic:
        """A topic by name.

        Raises:
            ValueError: it is not there (the words list those that are), or of another type.
        """
        topics = self.topics
        if topic not in topics:
            raise ValueError(f"{self.path} has no topic {topic}; it has {self.listing()}")
        if topics[topic].type not in types:
            raise ValueError(
                f"{topic} is {topics[topic].type}, not {' or '.join(types)}; "
                f"{self.path} has {self.listing()}"
            )
        return topics[topic]

    def of_type(self, *types: str) -> list[str]:
        """Names of the topics of some types."""
        return [topic.name for topic in self.topics.values() if topic.type in types]

    def listing(self) -> str:
        """Its topics for a message to the user."""
        return ", ".join(f"{t.name} ({t.type})" for t in self.topics.values()) or "no topics"


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
    if not (path / "metadata.yaml").is_file():
        raise ValueError(f"{path} exists and is no bag's folder: remove it, or choose another name")
    shutil.rmtree(path)


def _reliability(connection: Connection) -> str:
    profiles = getattr(connection.ext, "offered_qos_profiles", None)  # ROS 1 has none
    return profiles[0].reliability.name.lower() if profiles else "unknown"


def _information(storage: str, start: int, end: int, topics: list[tuple[str, str, int]]) -> dict:
    """What metadata.yaml would say of a file."""
    return {
        "version": 8,
        "storage_identifier": storage,
        "duration": {"nanoseconds": end - start},
        "starting_time": {"nanoseconds_since_epoch": start},
        "message_count": sum(count for _, _, count in topics),
        "compression_format": "",
        "compression_mode": "",
        "topics_with_message_count": [
            {
                "topic_metadata": {
                    "name": name,
                    "type": kind,
                    "serialization_format": "cdr",
                    "offered_qos_profiles": "",
                },
                "message_count": count,
            }
            for name, kind, count in topics
        ],
    }


def _mcap_topics(path: Path) -> dict:
    file = MCAPFile(path)
    try:
        file.open()
        if not file.channels:  # written without an index
            file.meta_scan()
        if file.statistics is None:
            raise ReaderError("it has no statistics record: mend it with `mcap recover`")
        counts = dict.fromkeys(file.channels, 0)
        counts |= dict(struct.iter_unpack("<HQ", file.statistics.channel_message_counts))
        start, end = file.statistics.start_time, file.statistics.end_time
        topics = [(c.topic, c.schema, counts[key]) for key, c in file.channels.items()]
    finally:
        if file.bio:
            file.close()
    return _information("mcap", start, end, topics)


def _check_length(path: Path) -> None:
    """Sqlite itself does not notice that the end of a file is missing until it reads there.

    Raises:
        ReaderError: the file is shorter than its header says.
    """
    with path.open("rb") as file:
        header = file.read(100)
    if len(header) < 100:
        raise ReaderError(f"{path.name} has no sqlite header")
    (page,) = struct.unpack_from(">H", header, 16)
    (pages,) = struct.unpack_from(">I", header, 28)
    if path.stat().st_size < pages * (65536 if page == 1 else page):
        raise ReaderError(f"{path.name} is cut")


def _sqlite_topics(path: Path) -> dict:
    _check_length(path)
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        topics = connection.execute(
            "SELECT name, type, (SELECT COUNT(*) FROM messages WHERE topic_id = topics.id) "
            "FROM topics"
        ).fetchall()
        start, end = connection.execute(
            "SELECT COALESCE(MIN(timestamp), 0), COALESCE(MAX(timestamp), 0) FROM messages"
        ).fetchone()
    finally:
        connection.close()
    return _information("sqlite3", start, end, topics)
