"""Bags as they are found: folders, sqlite3, of ROS 1, compressed, cut, with wrong metadata."""

from __future__ import annotations

import shutil
import sqlite3

import pytest
import yaml
import zstandard
from made_bag_files import (
    LEFT,
    STORE,
    info,
    pairs_of,
    serialised,
    write_folder,
    write_mcap,
)
from made_bags import COUNT
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.typesys import Stores, get_typestore

from kp_frontend.cli import main
from kp_training.evaluation.bags.files import find_files
from kp_training.evaluation.bags.reader import IMAGE, Bag
from kp_training.evaluation.bags.storage import StorageError
from kp_training.evaluation.bags.writer import _Messages
from kp_training.recordings import extract_images


@pytest.fixture(scope="module")
def messages(frames) -> list[tuple[str, str, int, bytes]]:
    return serialised(frames)


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
