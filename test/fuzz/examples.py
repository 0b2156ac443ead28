"""A valid example of each kind of file that a command reads."""

from __future__ import annotations

import contextlib
import io
import json
from functools import lru_cache
from pathlib import Path

import cv2
import made_world
import numpy as np
import torch
import yaml
from mcap.writer import Writer as McapWriter
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from kp_frontend.network import load_network, save_network
from kp_frontend.ros.messages import stereo_message
from kp_training import recordings
from kp_training.checkpoint import save_checkpoint
from kp_training.evaluation.bags.reader import CAMERA_INFO, DISPARITY, FEATURES, IMAGE, POSE
from kp_training.evaluation.bags.writer import _Messages
from kp_training.labels import Labels, label_in_parts
from kp_training.splits import split_images


@lru_cache(maxsize=1)
def messages() -> list[tuple[str, str, int, bytes]]:
    made = _Messages()
    found = []
    for frame in made_world.wall(2):
        small = made_world.cropped(frame)
        for topic, kind, message in made.of_frame(small, "image_rect"):
            found.append((topic, kind, frame.stamp, bytes(made.store.serialize_cdr(message, kind))))
    return found


def mcap(path: Path, **options: object) -> Path:
    made = _Messages().store
    with path.open("wb") as file:
        writer = McapWriter(file, chunk_size=8000, **options)
        writer.start("ros2")
        channels: dict[str, int] = {}
        for topic, kind, time, raw in messages():
            if topic not in channels:
                text = made.generate_msgdef(kind, ros_version=2)[0].encode()
                schema = writer.register_schema(kind, "ros2msg", text)
                channels[topic] = writer.register_channel(topic, "cdr", schema)
            writer.add_message(channels[topic], time, raw, time)
        writer.finish()
    return path


def folder_bag(folder: Path, storage: str, messages: list) -> Path:
    made = _Messages().store
    with Writer(folder, version=9, storage_plugin=StoragePlugin[storage]) as writer:
        connections: dict[str, object] = {}
        for topic, kind, time, raw in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=made)
            writer.write(connections[topic], time, raw)
    return folder


def ros1(path: Path) -> Path:
    old, made = get_typestore(Stores.ROS1_NOETIC), _Messages().store
    with Ros1Writer(path) as writer:
        connections: dict[str, object] = {}
        for topic, kind, time, raw in messages():
            if kind in (IMAGE, CAMERA_INFO, POSE):
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, kind, typestore=old)
                writer.write(connections[topic], time, made.cdr_to_ros1(raw, kind))
    return path


@lru_cache(maxsize=1)
def feature_messages() -> list[tuple[str, str, int, bytes]]:
    from rclpy.serialization import serialize_message
    from std_msgs.msg import Header

    found = []
    for i, frame in enumerate(made_world.wall(2)):
        header = Header(frame_id="left_optical")
        header.stamp.sec, header.stamp.nanosec = divmod(frame.stamp, 10**9)
        features = made_world.grid_features()
        message = stereo_message(features, header, header, i, "int8")
        found.append(("/f", FEATURES, frame.stamp, bytes(serialize_message(message))))
    return found + [m for m in messages() if m[1] == DISPARITY]


def features(folder: Path) -> Path:
    """A bag whose messages are damaged, not its records."""
    (folder / "messages.bin").write_bytes(b"".join(m[3] for m in feature_messages()))
    return folder / "messages.bin"


def rig(folder: Path, suffix: str = ".png") -> Path:
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


def kitti(folder: Path, name: str) -> Path:
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


def euroc(folder: Path, name: str) -> Path:
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


def scene(folder: Path, name: str) -> Path:
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


def homography(folder: Path) -> Path:
    for name in ("1.ppm", "2.ppm"):
        image = made_world.cropped(made_world.wall(1)[0]).left
        cv2.imwrite(str(folder / name), cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))
    (folder / "H_1_2").write_text("1.0 0.0 3.0\n0.0 1.0 2.0\n0.0 0.0 1.0\n")
    return folder / "H_1_2"


def labels(folder: Path) -> Path:
    rig(folder)
    file = folder / "labels.npz"
    label_in_parts(
        folder, file, lambda paths: [np.ones((20, 5)) for _ in paths], {"detector": "none"}
    )
    return file


def split(folder: Path) -> Path:
    labels = Labels(folder, np.array(["a.png", "b.png"]), *[np.zeros(0)] * 6)
    split_images(labels, 0, folder / "split.json")
    return folder / "split.json"


def weights(folder: Path) -> Path:
    save_network(load_network("tiny").train(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def training() -> tuple:
    network = load_network("tiny").train()
    ema = torch.optim.swa_utils.AveragedModel(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return ema, network, optimizer, scheduler


def checkpoint(folder: Path) -> Path:
    ema, network, optimizer, scheduler = training()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    save_checkpoint(folder / "checkpoint", ema, network, optimizer, scheduler, {"step": 1})
    return folder / "checkpoint"


def source(folder: Path) -> Path:
    bag = mcap(folder / "bag.mcap")
    with contextlib.redirect_stdout(io.StringIO()):
        recordings.extract_images(bag, "/left/image_rect", folder / "images", 1)
    return folder / "images" / "source.json"
