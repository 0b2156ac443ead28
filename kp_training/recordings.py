"""Extracts images from a bag (ROS 1 or 2), to train on recordings of a robot."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
from rich.progress import track

from kp_frontend.encodings import GreyConverter

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
NAMED = 5  # maximum number of unreadable images that are listed; all are counted


def extract_images(
    bag: Path, topic: str | None, cache: Path, every: int, bit_depth: str = "auto"
) -> Path:
    """Write every `every`-th image of a topic to a folder as `frame_000123.png`.

    Nothing is done if the folder already has the images of an earlier call with the same arguments.
    Unreadable images are skipped; their number and the reasons are printed.

    Args:
        bit_depth: number of bits used in 16-bit images, as `GreyConverter` takes it.

    Returns:
        The folder.

    Raises:
        ValueError: the bag or topic does not exist, the bag has several image topics and none is
            given, no image can be read, or the folder has images of another bag.
    """
    # Imported late: only bags need rosbags.
    from kp_training.evaluation.bags.reader import Bag
    from kp_training.evaluation.bags.stamps import stamp_text

    wanted = {"bag": str(bag.resolve()), "topic": topic, "every": every, "bit_depth": bit_depth}
    done = cache / "source.json"
    if done.is_file():
        _check_source(done, wanted)
        return cache
    for frame in cache.glob("frame_*.png"):  # left by an interrupted call
        frame.unlink()
    written, reasons, grey = 0, [], GreyConverter(bit_depth, print)
    with Bag(bag) as recording:
        topic = _image_topic(bag, topic, recording.of_type(*IMAGE_TYPES))
        cache.mkdir(parents=True, exist_ok=True)
        total = recording.topics[topic].count
        messages = track(recording.messages([topic]), "extracting images", total=total)
        for i, (_, time, raw) in enumerate(messages):
            if i % every:
                continue
            try:
                image = grey(recording.read(topic, raw))
            except ValueError as error:
                reasons.append(f"recorded at {stamp_text(time)}: {error}")
                continue
            cv2.imwrite(str(cache / f"frame_{written:06}.png"), image)
            written += 1
        notes, noted = recording.notes, recording.noted()
    for note in notes:
        print(f"note: {note}")
    if reasons:
        some = "; ".join(reasons[:NAMED]) + ("; ..." if len(reasons) > NAMED else "")
        print(f"skipped, not readable: {len(reasons)} images ({some})")
    if not written:
        why = (reasons or ["there is none"])[0] + noted
        raise ValueError(f"none of the images on {topic} of {bag} can be read: {why}")
    done.write_text(json.dumps(wanted | {"topic": topic}) + "\n")
    return cache


def _image_topic(bag: Path, topic: str | None, topics: list[str]) -> str:
    """The topic to read: the given one, or the only one with images.

    Raises:
        ValueError: the topic has no images, or several topics have some and none is given.
    """
    if topic is None and len(topics) == 1:
        return topics[0]
    if topic is None or topic not in topics:
        chosen = f"has no images on {topic!r}" if topic else "needs --topic"
        raise ValueError(f"{bag} {chosen}; image topics: {', '.join(topics) or 'none'}")
    return topic


def _check_source(file: Path, wanted: dict) -> None:
    """Check that the images of a folder were extracted as `wanted` says.

    Raises:
        ValueError: they were extracted from another bag or topic, or with other options.
    """
    source = _source(file)
    if source != wanted | {"topic": wanted["topic"] or source["topic"]}:
        raise ValueError(
            f"{file.parent} already has images of {source['topic']} of {source['bag']} (--every "
            f"{source['every']} --bit-depth {source['bit_depth']}); choose another folder"
        )


def _source(file: Path) -> dict:
    """Read the bag, topic and step that the images of a folder were extracted with.

    Raises:
        ValueError: the file is broken.
    """
    try:
        source = {"bit_depth": "auto"} | json.loads(file.read_text())
        if source.keys() != {"bag", "topic", "every", "bit_depth"}:
            raise ValueError("unexpected keys")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is broken ({error}); remove its folder") from error
    return source
