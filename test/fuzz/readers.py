"""For each kind of file that a command reads: a valid example, and how it is read.

A reader raises what `kp` turns into one line (`kp_frontend.cli.USER_ERRORS`), or returns. Anything
else is a fault.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import made_world
import numpy as np
import torch
import yaml
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from kp_frontend.cli import main
from kp_frontend.config import FrontendConfig
from kp_frontend.network import KeypointNetwork, load_network, save_network
from kp_frontend.ros.messages import stereo_message
from kp_training import recordings
from kp_training.checkpoint import load_checkpoint, save_checkpoint
from kp_training.config import load_config
from kp_training.evaluation.bags.evaluation import evaluate_bag
from kp_training.evaluation.bags.reader import CAMERA_INFO, DISPARITY, FEATURES, IMAGE, POSE, Bag
from kp_training.evaluation.bags.stereo import StereoBag
from kp_training.evaluation.bags.topics import StereoTopics, choose_topics
from kp_training.evaluation.bags.writer import _Messages
from kp_training.evaluation.homography.evaluation import find_pairs, load_pair
from kp_training.evaluation.scenes import load_scenes
from kp_training.evaluation.sequences import open_sequence
from kp_training.labels import Labels, label_in_parts, load_labels
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


@lru_cache(maxsize=1)
def _messages() -> list[tuple[str, str, int, bytes]]:
    made = _Messages()
    found = []
    for frame in made_world.wall(2):
        small = made_world.cropped(frame)
        for topic, kind, message in made.of_frame(small, "image_rect"):
            found.append((topic, kind, frame.stamp, bytes(made.store.serialize_cdr(message, kind))))
    return found


def _mcap(path: Path, **options: object) -> Path:
    made = _Messages().store
    with path.open("wb") as file:
        writer = McapWriter(file, chunk_size=8000, **options)
        writer.start("ros2")
        channels: dict[str, int] = {}
        for topic, kind, time, raw in _messages():
            if topic not in channels:
                text = made.generate_msgdef(kind, ros_version=2)[0].encode()
                schema = writer.register_schema(kind, "ros2msg", text)
                channels[topic] = writer.register_channel(topic, "cdr", schema)
            writer.add_message(channels[topic], time, raw, time)
        writer.finish()
    return path


def _folder_bag(folder: Path, storage: str, messages: list) -> Path:
    made = _Messages().store
    with Writer(folder, version=9, storage_plugin=StoragePlugin[storage]) as writer:
        connections: dict[str, object] = {}
        for topic, kind, time, raw in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=made)
            writer.write(connections[topic], time, raw)
    return folder


def _ros1(path: Path) -> Path:
    old, made = get_typestore(Stores.ROS1_NOETIC), _Messages().store
    with Ros1Writer(path) as writer:
        connections: dict[str, object] = {}
        for topic, kind, time, raw in _messages():
            if kind in (IMAGE, CAMERA_INFO, POSE):
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, kind, typestore=old)
                writer.write(connections[topic], time, made.cdr_to_ros1(raw, kind))
    return path


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


@lru_cache(maxsize=1)
def _feature_messages() -> list[tuple[str, str, int, bytes]]:
    from rclpy.serialization import serialize_message
    from std_msgs.msg import Header

    found = []
    for i, frame in enumerate(made_world.wall(2)):
        header = Header(frame_id="left_optical")
        header.stamp.sec, header.stamp.nanosec = divmod(frame.stamp, 10**9)
        features = made_world.grid_features()
        message = stereo_message(features, header, header, i, "int8")
        found.append(("/f", FEATURES, frame.stamp, bytes(serialize_message(message))))
    return found + [m for m in _messages() if m[1] == DISPARITY]


def _features(folder: Path) -> Path:
    """A bag whose messages are damaged, not its records."""
    (folder / "messages.bin").write_bytes(b"".join(m[3] for m in _feature_messages()))
    return folder / "messages.bin"


def read_features(path: Path) -> None:
    """As `evaluate bag` reads recorded features: the messages are damaged, the bag is whole."""
    data, messages = path.read_bytes(), []
    for topic, kind, time, raw in _feature_messages():
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


def _rig(folder: Path, suffix: str = ".png") -> Path:
    for side in ("left", "right"):
        (folder / side).mkdir()
        for i, frame in enumerate(made_world.wall(2)):
            image = getattr(made_world.cropped(frame), side)
            if suffix in (".ppm", ".gif", ".avif"):
                image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
            cv2.imwrite(str(folder / side / f"{i}{suffix}"), image)
    camera = made_world.cropped(made_world.wall(1)[0]).cameras[0]
    for side, tx in (("left", 0.0), ("right", -made_world.FOCAL * made_world.BASELINE)):
        p = camera.p.copy()
        p[0, 3] = tx
        text = {
            "image_width": camera.width,
            "image_height": camera.height,
            "distortion_model": "plumb_bob",
        }
        for name, matrix in (
            ("camera_matrix", camera.k),
            ("distortion_coefficients", np.full((1, 5), 0.01)),
            ("rectification_matrix", camera.r),
            ("projection_matrix", p),
        ):
            rows, columns = matrix.shape
            text[name] = {"rows": rows, "cols": columns, "data": matrix.ravel().tolist()}
        (folder / f"{side}.yaml").write_text(yaml.safe_dump(text))
    return folder


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


def _kitti(folder: Path, name: str) -> Path:
    frames = [made_world.cropped(f) for f in made_world.wall(2)]
    for side, images in (("image_0", "left"), ("image_1", "right")):
        (folder / side).mkdir()
        for i, frame in enumerate(frames):
            cv2.imwrite(str(folder / side / f"{i:06}.png"), getattr(frame, images))
    rows = [" ".join(map(str, c.p.reshape(-1))) for c in frames[0].cameras]
    (folder / "calib.txt").write_text(f"P0: {rows[0]}\nP1: {rows[1]}\n")
    poses = [" ".join(map(str, f.pose[:3].reshape(-1))) for f in frames]
    (folder / "poses.txt").write_text("\n".join(poses))
    (folder / "times.txt").write_text("0.0\n0.1\n")
    return folder / name


def _euroc(folder: Path, name: str) -> Path:
    stamps = (10**18, 10**18 + 10**8)
    for side, x in (("cam0", 0.0), ("cam1", 0.12)):
        at = np.eye(4)
        at[0, 3] = x
        text = {
            "T_BS": {"rows": 4, "cols": 4, "data": at.ravel().tolist()},
            "resolution": [96, 72],
            "intrinsics": [200.0, 200.0, 48.0, 36.0],
            "distortion_model": "radial-tangential",
            "distortion_coefficients": [0.01, 0.0, 0.0, 0.0],
        }
        (folder / side / "data").mkdir(parents=True)
        (folder / side / "sensor.yaml").write_text("%YAML:1.0\n" + yaml.safe_dump(text))
        for stamp, frame in zip(stamps, made_world.wall(2), strict=True):
            image = made_world.cropped(frame).left
            cv2.imwrite(str(folder / side / "data" / f"{stamp}.png"), image)
        (folder / side / "data.csv").write_text(
            "#stamp,file\n" + "\n".join(f"{stamp},{stamp}.png" for stamp in stamps)
        )
    truth = folder / "state_groundtruth_estimate0"
    truth.mkdir()
    (truth / "data.csv").write_text(
        "#t,x,y,z,w,x,y,z\n" + "\n".join(f"{stamp},0,0,0,1,0,0,0" for stamp in stamps)
    )
    return folder / name


def _scene(folder: Path, name: str) -> Path:
    place = folder / "scene"
    place.mkdir()
    frame = made_world.cropped(made_world.wall(1)[0])
    cv2.imwrite(str(place / "im0.png"), frame.left)
    cv2.imwrite(str(place / "im1.png"), frame.right)
    height, width = frame.left.shape
    map_ = np.nan_to_num(frame.disparity, nan=np.inf).astype("<f4")[::-1]
    (place / "disp0.pfm").write_bytes(f"Pf\n{width} {height}\n-1\n".encode() + map_.tobytes())
    (place / "calib.txt").write_text(
        "cam0=[200 0 48; 0 200 36; 0 0 1]\ncam1=[200 0 48; 0 200 36; 0 0 1]\n"
        f"doffs=0\nbaseline=120\nwidth={width}\nheight={height}\n"
    )
    if name == "scenes.json":
        entry = {"dir": "scene", "left": "im0.png", "right": "im1.png", "gt": "disp0.pfm"}
        (folder / name).write_text(json.dumps([entry | {"scale": 1}]))
        return folder / name
    return place / name


def read_scenes(path: Path) -> None:
    """As `evaluate middlebury`, `train` and `bag make middlebury` read scenes."""
    folder = path.parent if path.name == "scenes.json" else path.parent.parent
    load_scenes(folder)
    list(open_sequence("middlebury", folder).frames)


def _homography(folder: Path) -> Path:
    for name in ("1.ppm", "2.ppm"):
        image = made_world.cropped(made_world.wall(1)[0]).left
        cv2.imwrite(str(folder / name), cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))
    (folder / "H_1_2").write_text("1.0 0.0 3.0\n0.0 1.0 2.0\n0.0 0.0 1.0\n")
    return folder / "H_1_2"


def read_homography(path: Path) -> None:
    """As `evaluate homography` reads pairs."""
    for files in find_pairs(path.parent)[0]:
        load_pair(files, (64, 48))


def _labels(folder: Path) -> Path:
    _rig(folder)
    file = folder / "labels.npz"
    label_in_parts(
        folder, file, lambda paths: [np.ones((20, 5)) for _ in paths], {"detector": "none"}
    )
    return file


def read_labels(path: Path) -> None:
    """As `train` reads labels."""
    labels = load_labels(path.parent, path)
    for i in range(len(labels)):
        labels.of_image(i)


def _split(folder: Path) -> Path:
    labels = Labels(folder, np.array(["a.png", "b.png"]), *[np.zeros(0)] * 6)
    split_images(labels, 0, folder / "split.json")
    return folder / "split.json"


def read_split(path: Path) -> None:
    """As `train` reads which images are held out."""
    labels = Labels(path.parent, np.array(["a.png", "b.png"]), *[np.zeros(0)] * 6)
    split_images(labels, 0, path)


def _small_network() -> KeypointNetwork:
    return load_network("tiny").train()


def _weights(folder: Path) -> Path:
    save_network(_small_network(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def _training() -> tuple:
    network = _small_network()
    ema = torch.optim.swa_utils.AveragedModel(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return ema, network, optimizer, scheduler


def _checkpoint(folder: Path) -> Path:
    ema, network, optimizer, scheduler = _training()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    save_checkpoint(folder / "checkpoint", ema, network, optimizer, scheduler, {"step": 1})
    return folder / "checkpoint"


def read_checkpoint(path: Path) -> None:
    """As `train` reads where an earlier run stopped."""
    load_checkpoint(path, *_training())


def _text_file(name: str, text: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return make


def _of(make: Callable[[Path, str], Path], name: str) -> Make:
    return lambda folder: make(folder, name)


def _image(suffix: str) -> Kind:
    return Kind(lambda f: _rig(f, suffix) / "left" / f"0{suffix}", read_sequence("folder"))


def _source(folder: Path) -> Path:
    bag = _mcap(folder / "bag.mcap")
    with contextlib.redirect_stdout(io.StringIO()):
        recordings.extract_images(bag, "/left/image_rect", folder / "images", 1)
    return folder / "images" / "source.json"


def read_source(path: Path) -> None:
    """As `train --bag` reads what it extracted before."""
    recordings.extract_images(path.parent.parent / "bag.mcap", "/left/image_rect", path.parent, 1)


KINDS: dict[str, Kind] = {
    "bag.mcap": Kind(lambda f: _mcap(f / "bag.mcap"), read_bag),
    "bag.mcap, not compressed": Kind(
        lambda f: _mcap(f / "bag.mcap", compression=CompressionType.NONE, enable_crcs=False),
        read_bag,
    ),
    "bag.db3": Kind(
        lambda f: _folder_bag(f / "bag", "SQLITE3", _messages()) / "bag.db3", read_bag
    ),
    "bag.bag": Kind(lambda f: _ros1(f / "bag.bag"), read_bag),
    "metadata.yaml": Kind(
        lambda f: _folder_bag(f / "bag", "MCAP", _messages()) / "metadata.yaml", read_bag, True
    ),
    "bag for training": Kind(
        lambda f: _mcap(f / "bag.mcap", compression=CompressionType.NONE, enable_crcs=False),
        read_recording,
    ),
    "source.json": Kind(_source, read_source, True),
    "StereoFeatures": Kind(_features, read_features),
    "left.yaml": Kind(lambda f: _rig(f) / "left.yaml", read_sequence("folder"), True),
    "sensor.yaml": Kind(_of(_euroc, "cam0/sensor.yaml"), read_sequence("euroc"), True),
    "data.csv": Kind(_of(_euroc, "cam1/data.csv"), read_sequence("euroc"), True),
    "ground truth data.csv": Kind(
        _of(_euroc, "state_groundtruth_estimate0/data.csv"), read_sequence("euroc"), True
    ),
    "KITTI calib.txt": Kind(_of(_kitti, "calib.txt"), read_sequence("kitti"), True),
    "poses.txt": Kind(_of(_kitti, "poses.txt"), read_sequence("kitti"), True),
    "times.txt": Kind(_of(_kitti, "times.txt"), read_sequence("kitti"), True),
    "scenes.json": Kind(_of(_scene, "scenes.json"), read_scenes, True),
    "Middlebury calib.txt": Kind(_of(_scene, "calib.txt"), read_scenes, True),
    "disp0.pfm": Kind(_of(_scene, "disp0.pfm"), read_scenes),
    "H_1_2": Kind(_homography, read_homography, True),
    "labels.npz": Kind(_labels, read_labels),
    "split.json": Kind(_split, read_split, True),
    "log.jsonl": Kind(
        _text_file("log.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n'),
        read_log,
        True,
    ),
    "recipe.yaml": Kind(
        _text_file("recipe.yaml", "steps: 100\nbatch: 8\nviews:\n  zoom: [0.5, 1.5]\n"),
        lambda path: load_config(str(path)),
        True,
    ),
    "weights.safetensors": Kind(_weights, load_network),
    "checkpoint": Kind(_checkpoint, read_checkpoint),
    **{f"image{suffix}": _image(suffix) for suffix in IMAGES},
}  # fmt: skip
