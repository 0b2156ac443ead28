"""Images of a recording (ROS 1 or 2 bag), so that a robot's own can be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.progress import track

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
CHANNELS = {"mono8": 1, "8UC1": 1, "rgb8": 3, "bgr8": 3, "8UC3": 3, "rgba8": 4, "bgra8": 4}
TO_GREY = {
    "rgb8": cv2.COLOR_RGB2GRAY,
    "bgr8": cv2.COLOR_BGR2GRAY,
    "8UC3": cv2.COLOR_BGR2GRAY,
    "rgba8": cv2.COLOR_RGBA2GRAY,
    "bgra8": cv2.COLOR_BGRA2GRAY,
}


def grey_image(message: Any, kind: str) -> np.ndarray | None:
    """A grey image (H, W) uint8 of an image message; None if its compressed data is broken.

    Raises:
        ValueError: an encoding that is not read here.
    """
    if kind == IMAGE_TYPES[1]:
        return cv2.imdecode(np.asarray(message.data, np.uint8), cv2.IMREAD_GRAYSCALE)
    encoding = message.encoding
    if encoding in ("mono16", "16UC1"):
        order = ">u2" if message.is_bigendian else "<u2"
        rows = np.asarray(message.data, np.uint8).reshape(message.height, message.step)
        pixels = np.ascontiguousarray(rows[:, : 2 * message.width]).view(order)
        return (pixels >> 8).astype(np.uint8)
    if encoding not in CHANNELS:
        raise ValueError(f"images with encoding {encoding!r} are not read: {', '.join(CHANNELS)}")
    rows = np.asarray(message.data, np.uint8).reshape(message.height, message.step)
    channels = CHANNELS[encoding]
    pixels = rows[:, : channels * message.width].reshape(message.height, message.width, channels)
    return cv2.cvtColor(pixels, TO_GREY[encoding]) if channels > 1 else pixels[:, :, 0].copy()


def extract_images(bag: Path, topic: str | None, cache: Path, every: int) -> Path:
    """Write one of `every` images of a topic to a folder as `frame_000123.png`, once.

    Returns:
        The folder. If it holds the images of an earlier call with the same bag, nothing is done.

    Raises:
        ValueError: no such bag or topic, several topics and none chosen, no image, or the folder
            holds the images of something else.
    """
    from kp_training.evaluation.bags.reader import Bag  # only here: rosbags

    done = cache / "source.json"
    if done.is_file():
        source = json.loads(done.read_text())
        wanted = {"bag": str(bag.resolve()), "topic": topic or source["topic"], "every": every}
        if source != wanted:
            raise ValueError(f"{cache} holds the images of {source}; choose another folder")
        return cache
    if cache.exists():
        for frame in cache.glob("frame_*.png"):  # of a call that was interrupted
            frame.unlink()
    broken = written = 0
    with Bag(bag) as recording:
        topics = recording.of_type(*IMAGE_TYPES)
        if topic is None and len(topics) == 1:
            topic = topics[0]
        if topic not in topics:
            chosen = f"has no images on {topic!r}" if topic else "needs --topic"
            raise ValueError(f"{bag} {chosen}; image topics: {', '.join(topics) or 'none'}")
        cache.mkdir(parents=True, exist_ok=True)
        kind, total = recording.topics[topic].type, recording.topics[topic].count
        messages = track(recording.messages([topic]), "extracting images", total=total)
        for i, (_, _, raw) in enumerate(messages):
            if i % every:
                continue
            image = grey_image(recording.read(topic, raw), kind)
            if image is None:
                broken += 1
                continue
            cv2.imwrite(str(cache / f"frame_{written:06}.png"), image)
            written += 1
    if broken:
        print(f"left out, cannot be decoded: {broken} images")
    if not written:
        raise ValueError(f"no image on {topic} of {bag} could be read")
    source = {"bag": str(bag.resolve()), "topic": topic, "every": every}
    done.write_text(json.dumps(source) + "\n")
    return cache
