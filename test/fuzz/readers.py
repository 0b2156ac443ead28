"""For each kind of file that a command reads: a valid example, and how it is read.

A reader raises what `kp` turns into one line (`kp_frontend.cli.USER_ERRORS`), or returns. Anything
else is a fault.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from examples import (
    checkpoint,
    euroc,
    feature_messages,
    features,
    folder_bag,
    homography,
    kitti,
    labels,
    mcap,
    messages,
    rig,
    ros1,
    scene,
    source,
    split,
    training,
    weights,
)
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter

from kp_frontend.cli import main
from kp_frontend.config import FrontendConfig
from kp_frontend.network import load_network
from kp_training import recordings
from kp_training.checkpoint import load_checkpoint
from kp_training.config import load_recipe
from kp_training.evaluation.bags.evaluation import evaluate_bag
from kp_training.evaluation.bags.reader import Bag
from kp_training.evaluation.bags.stereo import StereoBag
from kp_training.evaluation.bags.topics import StereoTopics, choose_topics
from kp_training.evaluation.bags.writer import _Messages
from kp_training.evaluation.homography.evaluation import find_pairs, load_pair
from kp_training.evaluation.scenes import load_scenes
from kp_training.evaluation.sequences import open_sequence
from kp_training.labels import Labels, load_labels
from kp_training.runlog import read_log
from kp_training.splits import split_images

IMAGES = (".png", ".jpg", ".pgm", ".tif", ".webp", ".gif", ".bmp")
Make = Callable[[Path], Path]  # writes an example into a folder; returns the file to be damaged
Read = Callable[[Path], object]  # reads the damaged file as a command does


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    make: Make
    read: Read
    text: bool = False  # made of words and numbers, which are also exchanged


def read_bag(path: Path) -> None:
    """As `bag info`, `evaluate bag` and `train --bag` read a bag."""
    folder = path.parent if path.name == "metadata.yaml" else path
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(["bag", "info", str(folder)])
    with Bag(folder) as bag:
        topics = choose_topics(bag, StereoTopics())
        for frame in StereoBag(bag, topics).frames():
            with contextlib.suppress(ValueError):  # as evaluations skip such a pair
                frame.calibration()


def read_recording(path: Path) -> None:
    """As `train --bag` reads a bag."""
    cache = path.parent / "images"
    (cache / "source.json").unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        recordings.extract_images(path, "/left/image_rect", cache, 1)


def read_features(path: Path) -> None:
    """As `evaluate bag` reads recorded features: the messages are damaged, the bag is whole."""
    data, messages = path.read_bytes(), []
    for topic, kind, time, raw in feature_messages():
        messages.append((topic, kind, time, data[: len(raw)]))
        data = data[len(raw) :]
    made = _Messages().store
    file = path.parent / "features.mcap"
    with file.open("wb") as stream:
        writer = McapWriter(stream, compression=CompressionType.NONE)
        writer.start("ros2")
        for topic, kind, time, raw in messages:
            text = made.generate_msgdef(kind, ros_version=2)[0].encode()
            channel = writer.register_channel(
                topic, "cdr", writer.register_schema(kind, "ros2msg", text)
            )
            writer.add_message(channel, time, raw, time)
        writer.finish()
    evaluate_bag(file, StereoTopics(), FrontendConfig(), path.parent)


def read_sequence(layout: str) -> Read:
    """As `bag make` reads a folder."""

    def read(path: Path) -> None:
        folder = path.parent
        while folder.name != "example":
            folder = folder.parent
        for frame in open_sequence(layout, folder).frames:
            with contextlib.suppress(ValueError):  # as evaluations skip such a pair
                frame.calibration()
                frame.rectified()

    return read


def read_scenes(path: Path) -> None:
    """As `evaluate middlebury`, `train` and `bag make middlebury` read scenes."""
    folder = path.parent if path.name == "scenes.json" else path.parent.parent
    load_scenes(folder)
    list(open_sequence("middlebury", folder).frames)


def read_homography(path: Path) -> None:
    """As `evaluate homography` reads pairs."""
    for files in find_pairs(path.parent)[0]:
        load_pair(files, (64, 48))


def read_labels(path: Path) -> None:
    """As `train` reads labels."""
    labels = load_labels(path.parent, path)
    for i in range(len(labels)):
        labels.of_image(i)


def read_split(path: Path) -> None:
    """As `train` reads which images are held out."""
    labels = Labels(path.parent, np.array(["a.png", "b.png"]), *[np.zeros(0)] * 6)
    split_images(labels, 0, path)


def read_checkpoint(path: Path) -> None:
    """As `train` reads where an earlier run stopped."""
    load_checkpoint(path, *training())


def _text_file(name: str, text: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return make


def _of(make: Callable[[Path, str], Path], name: str) -> Make:
    return lambda folder: make(folder, name)


def _image(suffix: str) -> Kind:
    return Kind(lambda f: rig(f, suffix) / "left" / f"0{suffix}", read_sequence("folder"))


def read_source(path: Path) -> None:
    """As `train --bag` reads what it extracted before."""
    recordings.extract_images(path.parent.parent / "bag.mcap", "/left/image_rect", path.parent, 1)


KINDS: dict[str, Kind] = {
    "bag.mcap": Kind(lambda f: mcap(f / "bag.mcap"), read_bag),
    "bag.mcap, not compressed": Kind(
        lambda f: mcap(f / "bag.mcap", compression=CompressionType.NONE, enable_crcs=False),
        read_bag,
    ),
    "bag.db3": Kind(
        lambda f: folder_bag(f / "bag", "SQLITE3", messages()) / "bag.db3", read_bag
    ),
    "bag.bag": Kind(lambda f: ros1(f / "bag.bag"), read_bag),
    "metadata.yaml": Kind(
        lambda f: folder_bag(f / "bag", "MCAP", messages()) / "metadata.yaml", read_bag, True
    ),
    "bag for training": Kind(
        lambda f: mcap(f / "bag.mcap", compression=CompressionType.NONE, enable_crcs=False),
        read_recording,
    ),
    "source.json": Kind(source, read_source, True),
    "StereoFeatures": Kind(features, read_features),
    "left.yaml": Kind(lambda f: rig(f) / "left.yaml", read_sequence("folder"), True),
    "sensor.yaml": Kind(_of(euroc, "cam0/sensor.yaml"), read_sequence("euroc"), True),
    "data.csv": Kind(_of(euroc, "cam1/data.csv"), read_sequence("euroc"), True),
    "ground truth data.csv": Kind(
        _of(euroc, "state_groundtruth_estimate0/data.csv"), read_sequence("euroc"), True
    ),
    "KITTI calib.txt": Kind(_of(kitti, "calib.txt"), read_sequence("kitti"), True),
    "poses.txt": Kind(_of(kitti, "poses.txt"), read_sequence("kitti"), True),
    "times.txt": Kind(_of(kitti, "times.txt"), read_sequence("kitti"), True),
    "scenes.json": Kind(_of(scene, "scenes.json"), read_scenes, True),
    "Middlebury calib.txt": Kind(_of(scene, "calib.txt"), read_scenes, True),
    "disp0.pfm": Kind(_of(scene, "disp0.pfm"), read_scenes),
    "H_1_2": Kind(homography, read_homography, True),
    "labels.npz": Kind(labels, read_labels),
    "split.json": Kind(split, read_split, True),
    "log.jsonl": Kind(
        _text_file("log.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n'),
        read_log,
        True,
    ),
    "recipe.yaml": Kind(
        _text_file("recipe.yaml", "steps: 100\nbatch: 8\nviews:\n  zoom: [0.5, 1.5]\n"),
        lambda path: load_recipe(str(path)),
        True,
    ),
    "weights.safetensors": Kind(weights, load_network),
    "checkpoint": Kind(checkpoint, read_checkpoint),
    **{f"image{suffix}": _image(suffix) for suffix in IMAGES},
}  # fmt: skip
