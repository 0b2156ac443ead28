"""MCAP files, read as far as they go: cut, killed, without an index, with foreign channels.

The file is walked record by record; an index saves time, but is not needed. The `mcap` library
decodes the records. Its own readers end at the first damaged chunk, and take 45 us for a small
message where this walk takes 4.
"""

from __future__ import annotations

import heapq
import mmap
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from pathlib import Path

import lz4.frame
import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.reader import make_reader
from mcap.records import Channel as ChannelRecord
from mcap.records import Schema, Statistics
from mcap.summary import Summary

from kp_training.evaluation.bags.qos import offered_reliability
from kp_training.evaluation.bags.storage import Channel, Note, StorageError, reason_of, ros2_type

MAGIC = b"\x89MCAP0\r\n"
RECORD = struct.Struct("<BQ")  # opcode, length
MESSAGE = struct.Struct("<HIQQ")  # channel, sequence, time of recording, of publishing
CHUNK = struct.Struct("<QQQII")  # first and last time, length, checksum; length of compression
PRIVATE = 0x80  # opcodes from here on are applications' own
DESCRIBING = (Opcode.SCHEMA, Opcode.CHANNEL, Opcode.STATISTICS)  # small records
LAST_TIME = 2**63 - 1
# What damaged records and compressed data make the decoders raise.
DAMAGED = (
    McapError,
    ValueError,
    struct.error,
    RuntimeError,
    zstandard.ZstdError,
    MemoryError,
    OverflowError,
)
REMEDY = "`mcap recover` writes a whole file"

Data = bytes | mmap.mmap


@dataclass
class _Segment:
    """A chunk, or a row of messages that are in no chunk: bytes `begin` to `end` of the file."""

    start: int  # time of the first message
    begin: int
    end: int
    chunk: bool
    channels: set[int] = field(default_factory=set)  # by its message index; empty: unknown


def _records(data: Data, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Complete records from `begin` on: opcode, and where the content begins and ends."""
    while begin + RECORD.size <= end:
        opcode, length = RECORD.unpack_from(data, begin)
        begin += RECORD.size
        known = 0 < opcode <= Opcode.DATA_END or opcode >= PRIVATE
        if not known or begin + length > end:
            return
        yield opcode, begin, begin + length
        begin += length


class McapFile:
    """An open MCAP file.

    Raises:
        StorageError: it is no MCAP file, or an empty one.
    """

    def __init__(self, path: Path, note: Note) -> None:
        self.path, self._note = path, note
        self.start = self.end = 0
        self._forget()
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise StorageError(f"{path.name} does not begin as an MCAP file does")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        summary = self._summary()
        chunks = {} if summary is None else self._indexed(summary)
        closed = self._walk(chunks)
        if not closed and chunks:  # the index may be what is damaged
            self._forget()
            closed = self._walk({})
        if not closed:
            self._salvage(summary)
        counts: dict[int, int] = {}
        if self._statistics:
            counts |= self._statistics.channel_message_counts
        if not closed or not counts or counts.keys() - self._by_id.keys():
            self._scan(counts)
        elif self._statistics:
            times = self._statistics.message_start_time, self._statistics.message_end_time
            self.start, self.end = (min(t, LAST_TIME) for t in times)
        for number, channel in self._by_id.items():
            channel.count = max(channel.count, counts.get(number, 0))

    @property
    def channels(self) -> list[Channel]:
        """All channels, those of a topic may be several."""
        return list(self._by_id.values())

    def close(self) -> None:
        """Close the file."""
        self._data.close()

    def messages(self, wanted: Collection[Channel]) -> Iterator[tuple[Channel, int, bytes]]:
        """Messages of some channels in the order of their times.

        Messages that are in no chunk come in the order of the file.
        """
        ids = {number for number, channel in self._by_id.items() if channel in wanted}
        chunked = all(segment.chunk for segment in self._segments)
        segments = sorted(self._segments, key=lambda s: s.start) if chunked else self._segments
        waiting: list[tuple[int, int, int, bytes]] = []
        order = count()
        for segment in segments:
            if segment.channels and not segment.channels & ids:
                continue
            while waiting and waiting[0][0] < segment.start:
                time, _, number, raw = heapq.heappop(waiting)
                yield self._by_id[number], time, raw
            for number, time, raw in self._messages(segment):
                if number not in ids:
                    continue
                if chunked:
                    heapq.heappush(waiting, (time, next(order), number, raw))
                else:
                    yield self._by_id[number], time, raw
        while waiting:
            time, _, number, raw = heapq.heappop(waiting)
            yield self._by_id[number], time, raw

    def _forget(self) -> None:
        self._schemas: dict[int, Schema] = {}
        self._by_id: dict[int, Channel] = {}
        self._segments: list[_Segment] = []
        self._statistics: Statistics | None = None
        self._at = len(MAGIC)  # the byte after the last whole record
        self._ended = False  # whether the record that ends the data was found

    def _summary(self) -> Summary | None:
        """The summary at the end of the file, or None if it is missing or unreadable."""
        try:
            with self.path.open("rb") as file:
                return make_reader(file).get_summary()
        except (*DAMAGED, OSError):  # OSError: the file is shorter than a footer
            return None

    def _indexed(self, summary: Summary) -> dict[int, tuple[_Segment, int]]:
        """The chunks of an index by the byte where they begin, and where their records end."""
        chunks = {}
        for index in summary.chunk_indexes:
            begin, end = index.chunk_start_offset, index.chunk_start_offset + index.chunk_length
            if index.chunk_length > RECORD.size + CHUNK.size and end <= len(self._data):
                channels = set(index.message_index_offsets)
                segment = _Segment(
                    index.message_start_time, begin + RECORD.size, end, True, channels
                )
                chunks[begin] = segment, end + index.message_index_length
        return chunks

    def _walk(self, chunks: dict[int, tuple[_Segment, int]]) -> bool:
        """Find the segments and read the summary; whether the file was closed properly.

        Args:
            chunks: those that are known, by the byte where they begin. Of a large file this saves
                reading something near each of them.
        """
        row = False
        while True:
            if self._at in chunks and not self._ended:
                segment, self._at = chunks[self._at]
                self._segments.append(segment)
                row = False
                continue
            record = next(_records(self._data, self._at, len(self._data)), None)
            if record is None:
                return False
            opcode, begin, self._at = record
            if opcode == Opcode.CHUNK:
                self._add_chunk(begin, self._at)
            elif opcode == Opcode.MESSAGE and not self._ended:
                if not row:
                    self._segments.append(_Segment(0, begin - RECORD.size, self._at, False))
                self._segments[-1].end = self._at
            elif opcode == Opcode.MESSAGE_INDEX and self._segments and self._at - begin >= 2:
                (number,) = struct.unpack_from("<H", self._data, begin)
                self._segments[-1].channels.add(number)
            elif opcode == Opcode.DATA_END:
                self._ended = True
            elif opcode == Opcode.FOOTER:
                return True
            elif opcode in DESCRIBING:
                self._describe(opcode, self._data[begin : self._at])
            row = opcode == Opcode.MESSAGE

    def _salvage(self, summary: Summary | None) -> None:
        """Note that the file is damaged, and use what is found after the damage."""
        if self._ended:
            self._note(f"{self.path.name} ends within its summary: {REMEDY}")
        else:
            at, size = self._at, len(self._data)
            what = "was not closed" if at == size else f"is cut or damaged at byte {at} of {size}"
            self._note(f"{self.path.name} {what}: it is read as far as it goes; {REMEDY}")
            if self._data[at : at + 1] == bytes([Opcode.CHUNK]):
                self._add_chunk(at + RECORD.size, size)
        if summary is None:
            return
        self._statistics = summary.statistics
        for schema in summary.schemas.values():
            self._schemas.setdefault(schema.id, schema)
        for channel in summary.channels.values():
            self._add_channel(channel)
        found = {segment.begin for segment in self._segments}
        for segment, _ in self._indexed(summary).values():
            if segment.begin not in found and segment.begin > self._at:
                self._segments.append(segment)

    def _add_chunk(self, begin: int, end: int) -> None:
        if end - begin >= CHUNK.size:
            start = CHUNK.unpack_from(self._data, begin)[0]
            self._segments.append(_Segment(start, begin, end, True))

    def _scan(self, counts: dict[int, int]) -> None:
        """Read the whole file once: its channels, how many messages they have, and when."""
        found: Counter[int] = Counter()
        first, last = LAST_TIME, 0
        for segment in self._segments:
            for number, time, _ in self._messages(segment):
                found[number] += 1
                first, last = min(first, time), max(last, time)
        self.start, self.end = min(first, last), last
        for number, channel in self._by_id.items():
            channel.count = max(found[number], counts.get(number, 0))

    def _describe(self, opcode: int, content: bytes) -> None:
        """Process a record that describes the file."""
        stream = ReadDataStream(BytesIO(content))
        try:
            if opcode == Opcode.SCHEMA:
                schema = Schema.read(stream)
                self._schemas.setdefault(schema.id, schema)
            elif opcode == Opcode.CHANNEL:
                self._add_channel(ChannelRecord.read(stream))
            elif opcode == Opcode.STATISTICS:
                self._statistics = Statistics.read(stream)
        except DAMAGED as error:
            self._note(f"{self.path.name}: a damaged record is left out: {reason_of(error)}")

    def _add_channel(self, record: ChannelRecord) -> None:
        schema = self._schemas.get(record.schema_id)
        if record.id in self._by_id:
            return
        definition = "" if schema is None else schema.data.decode(errors="replace")
        self._by_id[record.id] = Channel(
            record.topic,
            "" if schema is None else ros2_type(schema.name),
            record.message_encoding,
            definition,
            "" if schema is None else schema.encoding,
            offered_reliability(record.metadata.get("offered_qos_profiles", "")),
        )

    def _messages(self, segment: _Segment) -> Iterator[tuple[int, int, bytes]]:
        """Channel's number, time and bytes of the messages of a segment."""
        data: Data = self._data
        begin, end = segment.begin, segment.end
        if segment.chunk:
            try:
                data = self._unpacked(segment)
            except DAMAGED as error:
                self._note(
                    f"{self.path.name}: the chunk at byte {segment.begin} is left out with all "
                    f"its messages: {reason_of(error)}"
                )
                return
            begin, end = 0, len(data)
        unknown, until = 0, begin
        for opcode, at, until in _records(data, begin, end):
            if opcode == Opcode.MESSAGE and until - at >= MESSAGE.size:
                number, _, time, _ = MESSAGE.unpack_from(data, at)
                if number in self._by_id:
                    yield number, min(time, LAST_TIME), data[at + MESSAGE.size : until]
                else:
                    unknown += 1
            elif segment.chunk and opcode in DESCRIBING:
                self._describe(opcode, data[at:until])
        where = f"{self.path.name}: of the chunk at byte {segment.begin}"
        if unknown:
            self._note(f"{where} {unknown} messages are left out: they belong to no channel")
        if until < end:
            self._note(f"{where} the last {end - until} of {end} bytes cannot be read")

    def _unpacked(self, segment: _Segment) -> bytes:
        """The records in a chunk. For a truncated chunk, the bytes that exist."""
        *_, size, checksum, name_length = CHUNK.unpack_from(self._data, segment.begin)
        at = segment.begin + CHUNK.size + name_length
        compression = self._data[segment.begin + CHUNK.size : at].decode()
        (length,) = struct.unpack_from("<Q", self._data, at)
        packed = self._data[at + 8 : min(at + 8 + length, segment.end)]
        whole = len(packed) == length
        if compression == "zstd":
            data = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
        elif compression == "lz4":
            data = lz4.frame.LZ4FrameDecompressor().decompress(packed)
        elif compression == "":
            data = packed
        else:
            raise ValueError(f"its compression {compression!r} is not known")
        if whole and len(data) != size:
            raise ValueError(f"it has {len(data)} bytes instead of {size}")
        if whole and checksum and zlib.crc32(data) != checksum:
            raise ValueError("its checksum is wrong")
        return data
