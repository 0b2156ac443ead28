"""Bags as they are found: merged, cut, killed, damaged, with foreign topics, of ROS 1."""

from __future__ import annotations

import json
import shutil
import sqlite3
import struct
from pathlib import Path

import pytest
import yaml
import zstandard
from made_bags import COUNT
from made_world import INTERVAL
from mcap.writer import CompressionType, IndexType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from kp_frontend.cli import main
from kp_training.evaluation.bags import reader
from kp_training.evaluation.bags.files import find_files
from kp_training.evaluation.bags.reader import CAMERA_INFO, IMAGE, Bag
from kp_training.evaluation.bags.stereo import StereoBag
from kp_training.evaluation.bags.storage import StorageError
from kp_training.evaluation.bags.storage_mcap import _records
from kp_training.evaluation.bags.topics import StereoTopics, choose_topics
from kp_training.evaluation.bags.writer import _Messages
from kp_training.recordings import extract_images

LEFT, RIGHT = "/left/image_rect", "/right/image_rect"
STORE = reader.typestore()


@pytest.fixture(scope="module")
def messages(frames) -> list[tuple[str, str, int, bytes]]:
    """Topic, type, time and CDR of images and camera_infos."""
    made = _Messages()
    return [
        (topic, kind, frame.stamp, bytes(STORE.serialize_cdr(message, kind)))
        for frame in frames
        for topic, kind, message in made.of_frame(frame, "image_rect")
        if kind in (IMAGE, CAMERA_INFO)
    ]


def definition(kind: str) -> str:
    return STORE.generate_msgdef(kind, ros_version=2)[0]


def write_mcap(
    path: Path,
    messages: list,
    profile: str = "ros2",
    second_after: int | None = None,
    definitions: dict[str, tuple[str, str]] | None = None,
    foreign: tuple = (),
    **options,
) -> Path:
    """An MCAP file.

    `second_after`: from this message on every topic has a new channel. `definitions`: (format,
    text) in place of the right one. `foreign`: (topic, encoding, type, format, text) of channels
    that are not ROS 2's.
    """
    with path.open("wb") as file:
        writer = McapWriter(file, **{"enable_crcs": True, "chunk_size": 60_000, **options})
        writer.start(profile)
        schemas, channels = {}, {}
        for topic, encoding, kind, form, text in foreign:
            schema = writer.register_schema(kind, form, text.encode()) if kind else 0
            channel = writer.register_channel(topic, encoding, schema)
            writer.add_message(channel, messages[0][2], b"{}", messages[0][2])
        for i, (topic, kind, time, raw) in enumerate(messages):
            if kind not in schemas:
                form, text = (definitions or {}).get(kind, ("ros2msg", definition(kind)))
                schemas[kind] = writer.register_schema(kind, form, text.encode())
            key = topic, second_after is not None and i >= second_after
            if key not in channels:
                # Metadata differ, or the writer takes the second channel for the first.
                about = {"publisher": str(key[1])}
                channels[key] = writer.register_channel(topic, "cdr", schemas[kind], about)
            writer.add_message(channels[key], time, raw, time)
        writer.finish()
    return path


def pairs_of(path: Path) -> tuple[int, list[str]]:
    """Number of pairs that can be read and have a calibration, and the notes."""
    with Bag(path) as bag:
        found = list(StereoBag(bag, choose_topics(bag, StereoTopics())).frames())
        assert all(frame.calibration().baseline > 0 for frame in found)
        return len(found), bag.notes


def info(path: Path, tmp_path: Path) -> dict:
    """What `kp bag info` says."""
    assert main(["bag", "info", str(path), "--json", str(tmp_path / "info.json")]) == 0
    return json.loads((tmp_path / "info.json").read_text())


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


def write_folder(folder: Path, messages: list, storage="MCAP", compression=None) -> Path:
    writer = Writer(folder, version=9, storage_plugin=StoragePlugin[storage])
    if compression:
        writer.set_compression(CompressionMode[compression], CompressionFormat.ZSTD)
    with writer:
        connections = {}
        for topic, kind, time, raw in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=STORE)
            writer.write(connections[topic], time, raw)
    return folder


@pytest.mark.parametrize("storage", ["MCAP", "SQLITE3"])
@pytest.mark.parametrize("compression", ["FILE", "MESSAGE"])
def test_compressed_bags_are_read_with_metadata_and_without(
    messages, tmp_path, storage, compression
):
    folder = write_folder(tmp_path / "bag", messages, storage, compression)
    assert pairs_of(folder) == (COUNT, [])
    (folder / "metadata.yaml").unlink()
    count, notes = pairs_of(folder)
    assert count == COUNT and "has no metadata.yaml" in notes[0] and "ros2 bag reindex" in notes[0]
    (file,) = folder.iterdir()
    assert pairs_of(file) == (COUNT, [])


def test_a_folder_without_usable_metadata_is_read(messages, tmp_path):
    folder = tmp_path / "drive"
    folder.mkdir()
    for i, part in enumerate((messages[:4], messages[4:12], messages[12:])):
        write_mcap(folder / f"drive_{(9, 10, 11)[i]}.mcap", part)
    assert [p.stem for p in find_files(folder, print).paths] == ["drive_9", "drive_10", "drive_11"]
    assert pairs_of(folder)[0] == COUNT
    (folder / "drive_11.mcap").write_bytes(b"")
    count, notes = pairs_of(folder)
    assert count == COUNT - 1 and "drive_11.mcap is empty" in notes[1]
    for text in ("", "a: [", "rosbag2_bagfile_information: 3", "\0"):
        (folder / "metadata.yaml").write_text(text)
        count, notes = pairs_of(folder)
        assert count == COUNT - 1 and "metadata.yaml cannot be read" in notes[0]


def test_files_that_metadata_does_not_match_are_told(messages, tmp_path):
    folder = write_folder(tmp_path / "bag", messages)
    shutil.copy(folder / "bag.mcap", folder / "bag_copy.mcap")
    count, notes = pairs_of(folder)
    assert count == COUNT and "bag_copy.mcap is not listed" in notes[0]
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text())
    metadata["rosbag2_bagfile_information"]["relative_file_paths"].append("bag_1.mcap")
    for topic in metadata["rosbag2_bagfile_information"]["topics_with_message_count"]:
        topic["message_count"] *= 2
    (folder / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    count, notes = pairs_of(folder)
    assert count == COUNT and "bag_1.mcap is listed in metadata.yaml, but is not there" in notes[0]
    assert f"{COUNT} of {2 * COUNT} messages of {LEFT} are missing" in notes


def test_what_is_no_bag_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.mcap").write_bytes(b"")
    (tmp_path / "text.mcap").write_text("hello " * 100)
    (tmp_path / "cut.db3").write_bytes(b"SQLite format 3\0" + bytes(4))
    (tmp_path / "zero.db3").write_bytes(b"SQLite format 3\0" + bytes(200))
    (tmp_path / "cut.bag").write_bytes(b"#ROSBAG V2.0\n" + bytes(40))
    (tmp_path / "cut.mcap.zstd").write_bytes(zstandard.compress(b"hello")[:9])
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "metadata.yaml").write_text(
        "rosbag2_bagfile_information: {relative_file_paths: [a], topics_with_message_count: []}"
    )
    words = {
        "empty": "neither metadata.yaml",
        "empty.mcap": "is empty",
        "text.mcap": "is no bag",
        "cut.db3": "sqlite3",
        "zero.db3": "cannot be read",
        "cut.bag": "rosbag reindex",
        "cut.mcap.zstd": "is cut or empty",
        "lost": "none of the files",
    }
    for name, expected in words.items():
        assert main(["bag", "info", str(tmp_path / name)]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert expected in line and "cannot be read as a bag" in line
    with pytest.raises(StorageError):
        find_files(tmp_path / "empty", print)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_cut_sqlite_file_is_read_as_far_as_it_goes(messages, tmp_path, share):
    folder = write_folder(tmp_path / "bag", messages, "SQLITE3")
    file = folder / "bag.db3"
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    count, notes = pairs_of(folder)
    assert 0 < count < COUNT and "is cut" in notes[0]
    assert any("are missing" in note for note in notes)
    assert 0 < info(file, tmp_path)["messages"] < 4 * COUNT


def test_an_mcap_file_that_ends_after_its_first_bytes_is_an_empty_recording(tmp_path):
    """The recorder was killed before it wrote a message."""
    (tmp_path / "killed.mcap").write_bytes(b"\x89MCAP0\r\n")
    report = info(tmp_path / "killed.mcap", tmp_path)
    assert report["messages"] == 0 and "was not closed" in report["notes"][0]


def test_a_file_that_metadata_lists_twice_is_read_once(messages, tmp_path):
    folder = write_folder(tmp_path / "bag", messages)
    metadata = folder / "metadata.yaml"
    metadata.write_text(metadata.read_text().replace("- bag.mcap", "- bag.mcap\n  - bag.mcap"))
    assert pairs_of(folder) == (COUNT, [])


def test_info_tells_messages_that_metadata_counts_and_no_file_has(messages, tmp_path):
    folder = write_folder(tmp_path / "bag", messages)
    metadata = folder / "metadata.yaml"
    content = yaml.safe_load(metadata.read_text())
    topics = content["rosbag2_bagfile_information"]["topics_with_message_count"]
    topics[0]["message_count"] += 3
    metadata.write_text(yaml.safe_dump(content))
    name = topics[0]["topic_metadata"]["name"]
    (note,) = info(folder, tmp_path)["notes"]
    assert note == f"3 of {COUNT + 3} messages of {name} are missing"


def test_metadata_of_a_broken_shape_does_not_matter(messages, tmp_path):
    folder = write_folder(tmp_path / "bag", messages)
    (folder / "metadata.yaml").write_text("[" * 3000)
    count, notes = pairs_of(folder)
    assert count == COUNT and "metadata.yaml cannot be read" in notes[0]


def test_an_old_sqlite_bag_without_definitions_is_read(messages, tmp_path):
    file = write_folder(tmp_path / "bag", messages, "SQLITE3") / "bag.db3"
    with sqlite3.connect(file) as database:
        database.execute("DROP TABLE message_definitions")
        database.execute("ALTER TABLE topics DROP COLUMN offered_qos_profiles")
    assert pairs_of(file) == (COUNT, [])


def test_a_ros1_bag_is_read_by_all_commands(frames, messages, tmp_path, capsys):
    path = tmp_path / "drive.bag"
    old = get_typestore(Stores.ROS1_NOETIC)
    with Ros1Writer(path) as writer:
        connections = {}
        for topic, kind, time, raw in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=old)
            writer.write(connections[topic], time, STORE.cdr_to_ros1(raw, kind))
    assert pairs_of(path) == (COUNT, [])
    with Bag(path) as bag:
        (again,) = (raw for topic, time, raw in bag.messages([LEFT]) if time == frames[0].stamp)
        assert again == messages[2][3]
    assert info(path, tmp_path)["messages"] == 4 * COUNT
    cache = extract_images(path, LEFT, tmp_path / "images", 1)
    assert len(list(cache.glob("*.png"))) == COUNT
    path.write_bytes(path.read_bytes()[:-5000])
    assert main(["bag", "info", str(path)]) == 1
    assert "rosbag reindex" in capsys.readouterr().err


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


def test_an_sqlite_recording_that_was_killed_is_read(messages, tmp_path):
    """Its last messages are in the write-ahead log; a topic may have several rows."""
    folder = write_folder(tmp_path / "bag", messages[:8], "SQLITE3")
    writing = sqlite3.connect(folder / "bag.db3")
    writing.execute("PRAGMA journal_mode = WAL")
    writing.execute(
        "INSERT INTO topics SELECT id + 100, name, type, serialization_format, "
        "offered_qos_profiles, type_description_hash FROM topics"
    )
    numbers = dict(writing.execute("SELECT name, id FROM topics WHERE id > 100"))
    rows = [(numbers[topic], time, raw) for topic, _, time, raw in messages[8:]]
    writing.executemany("INSERT INTO messages (topic_id, timestamp, data) VALUES (?, ?, ?)", rows)
    writing.commit()
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("bag.db3", "bag.db3-wal"):
        shutil.copy(folder / name, killed / name)
    writing.close()
    assert (killed / "bag.db3-wal").stat().st_size > 0
    assert pairs_of(killed)[0] == COUNT


def test_messages_may_be_compressed_one_by_one(messages, tmp_path):
    packed = [(*m[:3], zstandard.compress(m[3])) for m in messages]
    assert pairs_of(write_mcap(tmp_path / "bag.mcap", packed)) == (COUNT, [])
    broken = [(*m[:3], m[3][:20]) for m in packed]
    with Bag(write_mcap(tmp_path / "bad.mcap", broken)) as bag:
        assert list(bag.messages([LEFT])) == []
        assert "cannot be decoded" in bag.notes[0]


def test_images_that_cannot_be_read_are_left_out_of_training(frames, messages, tmp_path, capsys):
    made = _Messages()
    left = [m for m in messages if m[0] == LEFT]
    cut, odd = (made.image(made.header(i, "left"), frames[0].left, "mono8") for i in (1, 2))
    cut.data, odd.encoding = cut.data[:1000], "odd"
    bad = [(LEFT, IMAGE, i, bytes(STORE.serialize_cdr(m, IMAGE))) for i, m in enumerate((cut, odd))]
    bad.append((LEFT, IMAGE, 2, left[0][3][:-7]))
    path = write_mcap(tmp_path / "bag.mcap", [*bad, *left])
    folder = extract_images(path, None, tmp_path / "images", 1)
    assert len(list(folder.glob("*.png"))) == COUNT
    assert "skipped, not readable: 3 images (recorded at 0.000000000" in capsys.readouterr().out
    with pytest.raises(ValueError, match="can be read: recorded at"):
        extract_images(write_mcap(tmp_path / "bad.mcap", bad), None, tmp_path / "none", 1)
    (folder / "source.json").write_text("{}")
    with pytest.raises(ValueError, match=r"source\.json is broken"):
        extract_images(path, None, folder, 1)
