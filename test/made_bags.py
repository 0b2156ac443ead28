"""Bags of the made wall, and what the front end publishes of it."""

from __future__ import annotations

from pathlib import Path

from rosbags.rosbag2 import StoragePlugin, Writer

from kp_frontend.config import FrontendConfig
from kp_frontend.ros.messages import stereo_message
from kp_training.evaluation.bags import reader, writer
from kp_training.evaluation.bags.evaluation import evaluate_bag
from kp_training.evaluation.bags.stereo import Reading
from kp_training.evaluation.bags.topics import StereoTopics

CONFIG = FrontendConfig(backend="torch", threads=1, max_keypoints=256)
COUNT = 4  # frames of a bag


def write(path: Path, messages: list[tuple[str, str, int, object]]) -> Path:
    """A bag of (topic, type, nanoseconds, message), sent as it is written here."""
    store = reader.typestore()
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {}
        for topic, kind, time, message in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=store)
            raw = message if isinstance(message, bytes) else store.serialize_cdr(message, kind)
            writer.write(connections[topic], time, raw)
    return path


def messages_of(frames, image_name="image_rect") -> list[tuple[str, str, int, object]]:
    made = writer._Messages()
    return [
        (topic, kind, frame.stamp, message)
        for frame in frames
        for topic, kind, message in made.of_frame(frame, image_name)
    ]


def evaluate(path: Path, tmp_path: Path, given: StereoTopics | None = None, **options) -> dict:
    reading = Reading(**options)
    return evaluate_bag(path, given or StereoTopics(), CONFIG, tmp_path, reading)[0]


def recorded_messages(frames, descriptor_type="float32"):
    from rclpy.serialization import serialize_message
    from std_msgs.msg import Header

    from kp_frontend.frontend import StereoFrontend

    frontend, messages, results = StereoFrontend(CONFIG), [], []
    for i, frame in enumerate(frames):
        header = Header(frame_id="left_optical")
        header.stamp.sec, header.stamp.nanosec = divmod(frame.stamp, 10**9)
        results.append(frontend(frame.left, frame.right, frame.calibration()))
        message = stereo_message(results[-1], header, header, i, descriptor_type)
        messages.append(("/f", reader.FEATURES, frame.stamp, bytes(serialize_message(message))))
    return messages, results
