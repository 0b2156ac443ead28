"""Sqlite3 files of rosbag2, read as far as they go."""

from __future__ import annotations

import sqlite3
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from kp_training.evaluation.bags.qos import offered_reliability
from kp_training.evaluation.bags.storage import Channel, Note, StorageError, reason_of, ros2_type

MAGIC = b"SQLite format 3\0"
REMEDY = "`sqlite3 FILE .recover` writes what can be saved"


class SqliteFile:
    """An open sqlite3 file.

    Raises:
        StorageError: it is no such file, or its tables cannot be read.
    """

    def __init__(self, path: Path, note: Note) -> None:
        self.path, self._note = path, note
        self.start = self.end = 0
        self._check_length()
        try:
            self._database = self._connect()
            self._by_id = self._read_topics()
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise StorageError(f"{path.name} cannot be read: {reason_of(error)}") from error
        self._count()

    @property
    def channels(self) -> list[Channel]:
        """One for each topic."""
        return list(self._by_id.values())

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def messages(self, wanted: Collection[Channel]) -> Iterator[tuple[Channel, int, bytes]]:
        """Messages of some channels in the order of recording."""
        ids = [number for number, channel in self._by_id.items() if channel in wanted]
        marks = ", ".join("?" * len(ids))
        read = broken = 0
        try:
            # By the rows, not by the index of times: a damaged file reads on until it breaks.
            rows = self._database.execute(
                f"SELECT topic_id, timestamp, data FROM messages NOT INDEXED "
                f"WHERE topic_id IN ({marks}) ORDER BY id",
                ids,
            )
            for number, time, data in rows:
                read += 1
                if isinstance(time, int) and isinstance(data, bytes):
                    yield self._by_id[number], time, data
                else:
                    broken += 1
        except sqlite3.Error as error:
            why = reason_of(error)
            self._note(f"{self.path.name}: reading ends after {read} messages: {why}; {REMEDY}")
        if broken:
            self._note(f"{self.path.name}: {broken} rows hold no message")

    def _check_length(self) -> None:
        """Sqlite itself does not notice a missing end until it reads there."""
        with self.path.open("rb") as file:
            header = file.read(100)
        if len(header) < 100 or not header.startswith(MAGIC):
            raise StorageError(f"{self.path.name} does not begin as an sqlite3 file does")
        (page,) = struct.unpack_from(">H", header, 16)
        (pages,) = struct.unpack_from(">I", header, 28)
        size, expected = self.path.stat().st_size, pages * (65536 if page == 1 else page)
        if size < expected:
            self._note(
                f"{self.path.name} is cut, it has {size} of {expected} bytes: it is read as far "
                f"as it goes; {REMEDY}"
            )

    def _connect(self) -> sqlite3.Connection:
        """A connection that changes nothing on the disk."""
        uri = self.path.resolve().as_uri()
        database = sqlite3.connect(f"{uri}?mode=ro", uri=True)
        try:
            # Nothing can be written, but with this sqlite opens a file whose end is missing.
            database.execute("PRAGMA writable_schema = ON")
            database.execute("SELECT name FROM sqlite_master").fetchall()
        except sqlite3.OperationalError:  # a journal that may not be written, or a read-only disk
            database.close()
            database = sqlite3.connect(f"{uri}?immutable=1", uri=True)
            database.execute("PRAGMA writable_schema = ON")
            for suffix in ("-wal", "-journal"):
                if self.path.with_name(self.path.name + suffix).is_file():
                    self._note(
                        f"{self.path.name}{suffix} cannot be used: the last messages may miss"
                    )
        return database

    def _read_topics(self) -> dict[int, Channel]:
        """The channels by their number in the file."""
        columns = {row[1] for row in self._database.execute("PRAGMA table_info(topics)")}
        if not {"id", "name", "type"} <= columns:
            raise ValueError("it has no table of topics")
        offered = "offered_qos_profiles" if "offered_qos_profiles" in columns else "''"
        definitions: dict[str, tuple[str, str]] = {}
        if self._database.execute("PRAGMA table_info(message_definitions)").fetchall():
            rows = self._database.execute(
                "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions"
            )
            definitions = {str(kind): (str(text), str(form)) for kind, form, text in rows}
        rows = self._database.execute(
            f"SELECT id, name, type, serialization_format, {offered} FROM topics"
        )
        return {
            int(number): Channel(
                str(name),
                ros2_type(str(kind)),
                str(form),
                *definitions.get(str(kind), ("", "")),
                offered_reliability(str(qos)),
            )
            for number, name, kind, form, qos in rows
        }

    def _count(self) -> None:
        """How many messages each channel has, and when."""
        counts: Counter[object] = Counter()
        times = []
        try:
            # Row by row: of a damaged file those before the damage count.
            for number, time in self._database.execute(
                "SELECT topic_id, timestamp FROM messages NOT INDEXED"
            ):
                counts[number] += 1
                if isinstance(time, int):
                    times.append(time)
        except sqlite3.Error as error:
            self._note(
                f"{self.path.name}: only {counts.total()} messages can be counted: "
                f"{reason_of(error)}"
            )
        strange = sum(found for number, found in counts.items() if number not in self._by_id)
        if strange:
            self._note(f"{self.path.name}: {strange} messages belong to no topic and are left out")
        for number, channel in self._by_id.items():
            channel.count = counts[number]
        self.start, self.end = min(times, default=0), max(times, default=0)
