"""MCAP files as they are found: of any shape, cut, killed, damaged, with foreign topics."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import zstandard
from made_bag_files import (
    LEFT,
    RIGHT,
    STORE,
    info,
    pairs_of,
    serialised,
    write_mcap,
)
from made_bags import COUNT
from made_world import INTERVAL
from mcap.writer import CompressionType, IndexType
from mcap.writer import Writer as McapWriter

from kp_training.evaluation.bags.reader import IMAGE, Bag
from kp_training.evaluation.bags.storage_mcap import _records


@pytest.fixture(scope="module")
def messages(frames) -> list[tuple[str, str, int, bytes]]:
    return serialised(frames)


SHAPES = {
    "usual": {},
    "no chunks": {"use_chunking": False},
    "lz4": {"compression": CompressionType.LZ4},
    "not compressed": {"compression": CompressionType.NONE},
    "chunk index only": {"index_types": IndexType.CHUNK},
    "no index": {"index_types": IndexType.NONE},
    "no statistics": {"use_statistics": False, "index_types": IndexType.NONE},
    "channels in the data only": {"repeat_channels": False, "repeat_schemas": False},
    "no summary": {
        "use_statistics": False, "index_types": IndexType.NONE, "repeat_channels": False,
        "repeat_schemas": False, "use_summary_offsets": False,
    },
    "another profile": {"profile": ""},
    "merged": {"second_after": 6},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_an_mcap_file_is_read_whole(messages, tmp_path, shape):
    path = write_mcap(tmp_path / "bag.mcap", messages, **SHAPES[shape])
    assert pairs_of(path) == (COUNT, [])
    told = info(path, tmp_path)
    assert told["messages"] == 4 * COUNT and told["notes"] == []
    assert {t["name"]: t["count"] for t in told["topics"]} == dict.fromkeys(
        {m[0] for m in messages}, COUNT
    )
    assert told["seconds"] == pytest.approx((COUNT - 1) * INTERVAL / 1e9)


def test_a_channel_may_have_the_number_zero(messages, tmp_path):
    path = write_mcap(tmp_path / "bag.mcap", messages, use_chunking=False, enable_crcs=False)
    data = bytearray(path.read_bytes())
    for opcode, begin, end in _records(bytes(data), 8, len(data)):
        at = {4: [begin], 5: [begin], 11: range(begin + 46, end, 10)}.get(opcode, [])
        for place in at:  # channels, messages, counts in the statistics
            (number,) = struct.unpack_from("<H", data, place)
            struct.pack_into("<H", data, place, number - 1)
    path.write_bytes(data)
    assert pairs_of(path) == (COUNT, [])


FOREIGN = (
    ("/log", "protobuf", "own.Log", "protobuf", "\0\1"),
    ("/note", "json", "", "", ""),
    ("/schema", "json", "Note", "jsonschema", "{}"),
    ("/service", "cdr", "own/srv/Do_Event", "ros2msg", "Do_Request[<=1] request\n--- ]["),
    ("/empty", "cdr", "own/msg/Empty", "ros2msg", ""),
    ("/odd", "cdr", "own", "odd", "?"),
)


def test_foreign_channels_do_not_matter(messages, tmp_path):
    path = write_mcap(tmp_path / "bag.mcap", messages, foreign=FOREIGN)
    assert pairs_of(path) == (COUNT, [])
    topics = {t["name"]: t for t in info(path, tmp_path)["topics"]}
    assert {name for name, *_ in FOREIGN} <= topics.keys()
    assert topics["/log"]["encoding"] == "protobuf" and topics["/log"]["count"] == 1
    with Bag(path) as bag:
        with pytest.raises(ValueError, match="no definition of own/msg/Empty"):
            bag.read("/empty", b"\0\1\0\0")
        with pytest.raises(ValueError, match=r"/log is own\.Log, not"):
            bag.require("/log", IMAGE)


@pytest.mark.parametrize("form", ["", "ros2msg", "ros2idl", "odd"])
@pytest.mark.parametrize("text", ["", "int32 [[", "module {"])
def test_a_definition_that_cannot_be_parsed_is_taken_from_ros(messages, tmp_path, form, text):
    path = write_mcap(tmp_path / "bag.mcap", messages, definitions={IMAGE: (form, text)})
    count, notes = pairs_of(path)
    assert count == COUNT
    assert all("definition of sensor_msgs/msg/Image in the bag cannot be" in n for n in notes)


def test_a_definition_of_another_version_is_told(messages, tmp_path):
    other = {IMAGE: ("ros2msg", "uint32 height\nuint32 width\n")}
    path = write_mcap(tmp_path / "bag.mcap", messages, definitions=other)
    with Bag(path) as bag, pytest.raises(ValueError, match="has no header, encoding, is_big"):
        bag.read(LEFT, messages[2][3])


def test_a_topic_of_two_types_is_read_by_the_more_frequent_one(messages, tmp_path):
    foreign = ((LEFT, "json", "", "", ""), (RIGHT, "cdr", "own/msg/Other", "ros2msg", "int8 a"))
    count, notes = pairs_of(write_mcap(tmp_path / "bag.mcap", messages, foreign=foreign))
    assert count == COUNT
    assert [n for n in notes if f"{LEFT} also has 1 messages of type unknown (json)" in n]
    assert [n for n in notes if f"{RIGHT} also has 1 messages of type own/msg/Other" in n]


@pytest.mark.parametrize("compression", [CompressionType.NONE, CompressionType.ZSTD])
def test_a_cut_mcap_file_is_read_as_far_as_it_goes(messages, tmp_path, compression):
    path = write_mcap(tmp_path / "whole.mcap", messages, compression=compression)
    whole, cut = path.read_bytes(), tmp_path / "cut.mcap"
    found = []
    for share in (0.5, 0.7, 0.9, 0.999):
        cut.write_bytes(whole[: int(share * len(whole))])
        count, notes = pairs_of(cut)
        found.append(count)
        assert "mcap recover" in notes[0]
        assert info(cut, tmp_path)["notes"][0] == notes[0]
    assert found == sorted(found) and 0 < found[0] < found[2] < COUNT == found[3]


def test_a_recording_that_was_killed_is_read(messages, tmp_path):
    path = write_mcap(tmp_path / "bag.mcap", messages)
    data = path.read_bytes()
    ends = [begin - 9 for opcode, begin, _ in _records(data, 8, len(data)) if opcode == 15]
    path.write_bytes(data[: ends[0]])
    count, notes = pairs_of(path)
    assert count == COUNT and "was not closed" in notes[0]


def chunks_of(path: Path) -> list[tuple[int, int]]:
    data = path.read_bytes()
    return [(b, e) for opcode, b, e in _records(data, 8, len(data)) if opcode == 6]


def test_a_damaged_chunk_is_left_out_alone_and_counted(messages, tmp_path):
    path = write_mcap(tmp_path / "bag.mcap", messages, compression=CompressionType.NONE)
    data = bytearray(path.read_bytes())
    begin, end = chunks_of(path)[1]
    data[(begin + end) // 2] ^= 0xFF
    path.write_bytes(data)
    count, notes = pairs_of(path)
    assert 0 < count < COUNT
    assert "is left out with all its messages: its checksum is wrong" in notes[0]
    assert any("messages of /" in n and "are missing" in n for n in notes[1:])


@pytest.mark.parametrize("damage", ["opcode", "length"])
@pytest.mark.parametrize("index", [IndexType.ALL, IndexType.NONE])
def test_a_damaged_record_does_not_end_a_file_with_an_index(messages, tmp_path, damage, index):
    path = write_mcap(tmp_path / "bag.mcap", messages, index_types=index)
    data = bytearray(path.read_bytes())
    begin, _ = chunks_of(path)[1]
    if damage == "opcode":
        data[begin - 9] = 0x77
    else:
        struct.pack_into("<Q", data, begin - 8, 1 << 40)
    path.write_bytes(data)
    count, notes = pairs_of(path)
    if index == IndexType.ALL:
        assert (count, notes) == (COUNT, [])
    else:
        assert 0 < count < COUNT and f"damaged at byte {begin - 9}" in notes[0]
        assert any("are missing" in note for note in notes)


def test_a_damaged_index_does_not_matter(messages, tmp_path):
    path = write_mcap(tmp_path / "bag.mcap", messages)
    whole = path.read_bytes()
    for opcode, begin, _ in _records(whole, 8, len(whole)):
        if opcode == 8:  # a chunk's place and lengths
            for place in (begin + 16, begin + 24):
                data = bytearray(whole)
                struct.pack_into("<Q", data, place, struct.unpack_from("<Q", data, place)[0] + 7)
                path.write_bytes(data)
                assert pairs_of(path) == (COUNT, [])


def test_statistics_that_promise_more_are_compared(messages, tmp_path):
    path = write_mcap(tmp_path / "bag.mcap", messages)
    data = bytearray(path.read_bytes())
    (begin,) = (b for opcode, b, _ in _records(bytes(data), 8, len(data)) if opcode == 11)
    struct.pack_into("<Q", data, begin + 46 + 2, 9)  # the first channel's
    path.write_bytes(data)
    assert pairs_of(path) == (COUNT, ["5 of 9 messages of /left/camera_info are missing"])


def test_an_mcap_file_that_ends_after_its_first_bytes_is_an_empty_recording(tmp_path):
    """The recorder was killed before it wrote a message."""
    (tmp_path / "killed.mcap").write_bytes(b"\x89MCAP0\r\n")
    report = info(tmp_path / "killed.mcap", tmp_path)
    assert report["messages"] == 0 and "was not closed" in report["notes"][0]


def test_an_mcap_file_of_ros1_is_read(messages, tmp_path):
    """What `mcap convert` makes of a ROS 1 bag."""
    path = tmp_path / "bag.mcap"
    with path.open("wb") as file:
        writer = McapWriter(file)
        writer.start("ros1")
        channels = {}
        for topic, kind, time, raw in messages:
            if topic not in channels:
                name = kind.replace("/msg/", "/")
                schema = writer.register_schema(name, "ros1msg", b"Header header")
                channels[topic] = writer.register_channel(topic, "ros1", schema)
            message = bytes(STORE.cdr_to_ros1(raw, kind))
            writer.add_message(channels[topic], time, message, time)
        writer.finish()
    assert pairs_of(path) == (COUNT, [])


def test_messages_may_be_compressed_one_by_one(messages, tmp_path):
    packed = [(*m[:3], zstandard.compress(m[3])) for m in messages]
    assert pairs_of(write_mcap(tmp_path / "bag.mcap", packed)) == (COUNT, [])
    broken = [(*m[:3], m[3][:20]) for m in packed]
    with Bag(write_mcap(tmp_path / "bad.mcap", broken)) as bag:
        assert list(bag.messages([LEFT])) == []
        assert "cannot be decoded" in bag.notes[0]
