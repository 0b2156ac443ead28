"""`kp bag make`: a stereo sequence with its calibration and ground truth as a rosbag2."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.progress import track
from rosbags.interfaces import (
    Connection,
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import StoragePlugin, Writer
from scipy.spatial.transform import Rotation

from kp_frontend.ros.environment import typestore
from kp_training.evaluation.bags.reader import (
    CAMERA_INFO,
    DISPARITY,
    IMAGE,
    POSE,
    Message,
    remove_bag,
    storage_of,
)
from kp_training.evaluation.frames import Camera, Sequence, StereoFrame
from kp_training.evaluation.reasons import listed

DISPARITY_TOPIC = "/ground_truth/disparity"
POSE_TOPIC = "/ground_truth/pose"
_LONG = QosTime(2147483647, 4294967295)  # rosbag2's "for ever"
# What a camera's driver offers: reliable serves subscribers of either kind.
QOS = Qos(
    QosHistory.KEEP_LAST, 10, QosReliability.RELIABLE, QosDurability.VOLATILE, _LONG, _LONG,
    QosLiveliness.AUTOMATIC, _LONG, False,
)  # fmt: skip


class _Messages:
    """Makes the messages of a frame."""

    def __init__(self) -> None:
        self.store = typestore()
        self.type = self.store.types

    def header(self, stamp: int, frame_id: str) -> Message:
        time = self.type["builtin_interfaces/msg/Time"](*divmod(stamp, 1_000_000_000))
        return self.type["std_msgs/msg/Header"](time, frame_id)

    def image(self, header: Message, pixels: np.ndarray, encoding: str) -> Message:
        height, width = pixels.shape
        data = np.ascontiguousarray(pixels).view(np.uint8).reshape(-1)
        step = width * pixels.itemsize
        return self.type[IMAGE](header, height, width, encoding, 0, step, data)

    def camera_info(self, header: Message, camera: Camera) -> Message:
        return self.type[CAMERA_INFO](
            header, camera.height, camera.width, camera.model, camera.d,
            camera.k.reshape(-1), camera.r.reshape(-1), camera.p.reshape(-1), 0, 0, self._roi(),
        )  # fmt: skip

    def _roi(self) -> Message:
        return self.type["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)

    def disparity(self, header: Message, frame: StereoFrame, disparity: np.ndarray) -> Message:
        try:
            calibration = frame.calibration()
        except ValueError:  # no baseline, as in camera_info; f and T are then 0 (unknown)
            calibration = None
        known = disparity[np.isfinite(disparity)]
        return self.type[DISPARITY](
            header,
            self.image(header, disparity.astype("<f4"), "32FC1"),
            calibration.fx if calibration else 0.0,
            calibration.baseline if calibration else 0.0,
            self._roi(),
            float(known.min()) if known.size else 0.0,
            float(known.max()) if known.size else 0.0,
            0.0,
        )

    def pose(self, header: Message, pose: np.ndarray) -> Message:
        point = self.type["geometry_msgs/msg/Point"](*map(float, pose[:3, 3]))
        turn = Rotation.from_matrix(pose[:3, :3]).as_quat()
        quaternion = self.type["geometry_msgs/msg/Quaternion"](*map(float, turn))
        return self.type[POSE](header, self.type["geometry_msgs/msg/Pose"](point, quaternion))

    def of_frame(self, frame: StereoFrame, image_name: str) -> list[tuple[str, str, Message]]:
        """Topic, type and message of all data of a frame."""
        rig = f"{frame.camera}/" if frame.camera else ""
        heads = [self.header(frame.stamp, f"{rig}{s}_optical") for s in ("left", "right")]
        height, width = frame.left.shape
        cameras = frame.cameras or (Camera.unknown(width, height),) * 2
        # Infos first: one that comes before its image is there when the image is processed.
        sides = tuple(zip(("left", "right"), heads, cameras, strict=True))
        messages = [
            (f"/{side}/camera_info", CAMERA_INFO, self.camera_info(head, camera))
            for side, head, camera in sides
        ]
        for side, head, _ in sides:
            image = self.image(head, getattr(frame, side), "mono8")
            messages.append((f"/{side}/{image_name}", IMAGE, image))
        if frame.disparity is not None:
            truth = self.disparity(heads[0], frame, frame.disparity)
            messages.append((DISPARITY_TOPIC, DISPARITY, truth))
        if frame.pose is not None:
            world = self.header(frame.stamp, "world")
            messages.append((POSE_TOPIC, POSE, self.pose(world, frame.pose)))
        return messages


def write_bag(sequence: Sequence, path: Path, storage: str | None = None) -> dict[str, int]:
    """Write a sequence to the rosbag2 folder `path`, in place of an earlier bag there.

    Args:
        storage: `mcap` or `sqlite3`; by default selected by the suffix of the name.

    Returns:
        Number of messages of each topic.

    Raises:
        ValueError: something else is at `path`, or no frame could be used.
    """
    remove_bag(path)
    plugin = StoragePlugin[(storage or storage_of(path)).upper()]
    messages = _Messages()
    connections: dict[str, Connection] = {}
    counts: dict[str, int] = {}
    image_name = "image_raw" if sequence.raw else "image_rect"
    with _complete(path), Writer(path, version=9, storage_plugin=plugin) as writer:
        for frame in track(sequence.frames, "writing", total=sequence.length):
            for topic, kind, message in messages.of_frame(frame, image_name):
                if topic not in connections:
                    connections[topic] = writer.add_connection(
                        topic, kind, typestore=messages.store, offered_qos_profiles=[QOS]
                    )
                raw = messages.store.serialize_cdr(message, kind)
                writer.write(connections[topic], frame.stamp, raw)
                counts[topic] = counts.get(topic, 0) + 1
        if not counts:
            raise ValueError(f"no frame could be used: {listed(sequence.left_out)}")
    return counts


@contextmanager
def _complete(path: Path) -> Iterator[None]:
    """Remove the bag if writing fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
