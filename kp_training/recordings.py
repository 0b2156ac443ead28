"""Images of a recording (ROS 1 or 2 bag), so that a robot's own can be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
from rich.progress import track

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
NAMED = 5  # images that cannot be read are named up to this number, all are counted


def extract_images(bag: Path, topic: str | None, cache: Path, every: int) -> Path:
    """Write one of `every` images of a topic to a folder as `frame_000123.png`, once.

    Images that cannot be read are left out; how many, and why, is printed.

    Returns:
        The folder. If it holds the images of an earlier call with the same bag, nothing is done.

    Raises:
        ValueError: no such bag or topic, several topics and none chosen, no image, or the folder
            holds the images of something else.
    """
    from kp_training.evaluation.bags.messages import grey_image  # only here: rosbags
    from kp_training.evaluation.bags.reader import Bag
    from kp_training.evaluation.bags.stereo import stamp_text

    done = cache / "source.json"
    if done.is_file():
        source = _source(done)
        wanted = {"bag": str(bag.resolve()), "topic": topic or source["topic"], "every": every}
        if source != wanted:
            raise ValueError(
                f"{cache} holds one of {source['every']} images of {source['topic']} of "
                f"{source['bag']}; choose another folder"
            )
        return cache
    if cache.exists():
        for frame in cache.glob("frame_*.png"):  # of a call that was interrupted
            frame.unlink()
    written, reasons = 0, []
    with Bag(bag) as recording:
        topics = recording.of_type(*IMAGE_TYPES)
        if topic is None and len(topics) == 1:
            topic = topics[0]
        if topic not in topics:
            chosen = f"has no images on {topic!r}" if topic else "needs --topic"
            raise ValueError(f"{bag} {chosen}; image topics: {', '.join(topics) or 'none'}")
        cache.mkdir(parents=True, exist_ok=True)
        total = recording.topics[topic].count
        messages = track(recording.messages([topic]), "extracting images", total=total)
        for i, (_, time, raw) in enumerate(messages):
            if i % every:
                continue
            try:
                image = grey_image(recording.read(topic, raw))
            except ValueError as error:
                reasons.append(f"recorded at {stamp_text(time)}: {error}")
                continue
            cv2.imwrite(str(cache / f"frame_{written:06}.png"), image)
            written += 1
        notes = recording.notes
    for note in notes:
        print(f"note: {note}")
    if reasons:
        some = "; ".join(reasons[:NAMED]) + ("; ..." if len(reasons) > NAMED else "")
        print(f"left out, cannot be read: {len(reasons)} images ({some})")
    if not written:
        why = "; ".join([*reasons[:1], *notes]) or "there is none"
        raise ValueError(f"no image on {topic} of {bag} could be read: {why}")
    source = {"bag": str(bag.resolve()), "topic": topic, "every": every}
    done.write_text(json.dumps(source) + "\n")
    return cache


def _source(file: Path) -> dict:
    """What the images in a folder were extracted from.

    Raises:
        ValueError: the file does not say so.
    """
    try:
        source = json.loads(file.read_text())
        if source.keys() != {"bag", "topic", "every"}:
            raise ValueError("other keys are expected")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is broken, remove its folder: {error}") from error
    return source
