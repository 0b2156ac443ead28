"""Bags of the made wall as other programs record them, and what is read of them."""

from __future__ import annotations

import json
from pathlib import Path

from mcap.writer import Writer as McapWriter
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from kp_frontend.cli import main
from kp_training.evaluation.bags import reader
from kp_training.evaluation.bags.reader import CAMERA_INFO, IMAGE, Bag
from kp_training.evaluation.bags.stereo import StereoBag
from kp_training.evaluation.bags.topics import StereoTopics, choose_topics
from kp_training.evaluation.bags.writer import _Messages

LEFT, RIGHT = "/left/image_rect", "/right/image_rect"
STORE = reader.typestore()


def serialised(frames) -> list[tuple[str, str, int, bytes]]:
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
