"""`kp demo`: streams a real stereo pair with ground truth through the real node.

Three processes communicate over DDS: a replay that publishes images and camera_info, the node, and
this process, which records a bag and compares the features with the ground truth. The pair is
Middlebury 2014 "Motorcycle" (Scharstein et al., 2014) from scikit-image. A 640x480 window pans over
it, so every frame is different and has its own camera_info.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import rclpy
import skimage.data
from builtin_interfaces.msg import Time as TimeMsg
from diagnostic_msgs.msg import DiagnosticArray
from kp_msgs.msg import StereoFeatures as StereoFeaturesMsg
from PIL import Image as PilImage
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.serialization import deserialize_message
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sensor_msgs.msg import CameraInfo, Image

from kp_frontend.ros.environment import share_folder, typestore
from kp_frontend.ros.messages import image_message
from kp_frontend.ros.processes import check_alive, private_environment, process
from kp_frontend.tools.overlay import draw_matches

WIDTH, HEIGHT = 640, 480
# Calibration of the pair, from its release (quarter size).
FOCAL, CX, CY, BASELINE, OFFSET = 994.978, 311.193, 254.877, 0.193001, 31.086
TOPICS = {
    "left/image": Image,
    "right/image": Image,
    "left/camera_info": CameraInfo,
    "right/camera_info": CameraInfo,
    "kp_frontend/features": StereoFeaturesMsg,
}
NODE_START_SECONDS = 180.0  # includes building the engine


@dataclass(frozen=True)
class Pair:
    """A rectified grey pair and the true disparity of the left image, NaN where unknown."""

    left: np.ndarray
    right: np.ndarray
    disparity: np.ndarray


def load_pair() -> Pair:
    """The Motorcycle pair, 741x500."""
    left, right, disparity = skimage.data.stereo_motorcycle()
    disparity = np.where(np.isfinite(disparity) & (disparity > 0), disparity, np.nan)
    grey_left, grey_right = (cv2.cvtColor(v, cv2.COLOR_RGB2GRAY) for v in (left, right))
    return Pair(grey_left, grey_right, disparity)


def window_place(frame: int, pair: Pair) -> tuple[int, int]:
    """Top left corner (x, y) of the window in a frame. It moves on an ellipse over the pair."""
    height, width = pair.left.shape
    angle = 2 * math.pi * frame / 100
    x = (width - WIDTH) * (1 - math.cos(angle)) / 2
    y = (height - HEIGHT) * (1 - math.sin(angle)) / 2
    return round(x), round(y)


def camera_infos(x: int, y: int) -> tuple[CameraInfo, CameraInfo]:
    """Calibration of the left and right window at (x, y)."""
    infos = []
    for cx, shift in ((CX, 0.0), (CX + OFFSET, -FOCAL * BASELINE)):
        info = CameraInfo(width=WIDTH, height=HEIGHT, distortion_model="plumb_bob")
        info.k = [FOCAL, 0.0, cx - x, 0.0, FOCAL, CY - y, 0.0, 0.0, 1.0]
        info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
        info.p = [FOCAL, 0.0, cx - x, shift, 0.0, FOCAL, CY - y, 0.0, 0.0, 0.0, 1.0, 0.0]
        info.d = [0.0] * 5
        infos.append(info)
    return tuple(infos)


def replay(frames: int, rate: float) -> None:
    """Publish the stream once both images have subscribers. Runs in the replay process."""
    rclpy.init()
    node = Node("replay")
    publishers = {t: node.create_publisher(TOPICS[t], t, 10) for t in list(TOPICS)[:4]}
    pair = load_pair()
    expected = int(os.environ.get("KP_DEMO_LISTENERS", "1"))
    while min(p.get_subscription_count() for p in publishers.values()) < expected:
        time.sleep(0.1)
    time.sleep(0.5)  # until both ends of every connection are discovered
    begin = time.monotonic()
    for frame in range(frames):
        time.sleep(max(0.0, begin + frame / rate - time.monotonic()))
        x, y = window_place(frame, pair)
        stamp = node.get_clock().now().to_msg()
        messages = dict(zip(list(TOPICS)[2:4], camera_infos(x, y), strict=True))
        for topic, image in (("left/image", pair.left), ("right/image", pair.right)):
            window = image[y : y + HEIGHT, x : x + WIDTH]
            messages[topic] = image_message(window, "mono8")
        for topic, message in messages.items():
            message.header.stamp = stamp
            message.header.frame_id = f"{topic.partition('/')[0]}_camera_optical_frame"
            publishers[topic].publish(message)
    time.sleep(1.0)  # reliable delivery of the last messages
    node.destroy_node()
    rclpy.try_shutdown()


class Listener(Node):
    """Records all topics as raw bytes for the bag, and parses the messages for the report."""

    def __init__(self) -> None:
        super().__init__("demo_listener")
        self.recorded: list[tuple[str, int, bytes]] = []
        self.results: list[tuple[float, StereoFeaturesMsg]] = []
        self.counts: dict[str, str] = {}
        for topic, kind in TOPICS.items():
            self.create_subscription(kind, topic, partial(self._record, topic), 100, raw=True)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._diagnostics, 5)

    def _record(self, topic: str, raw: bytes) -> None:
        now = self.get_clock().now().nanoseconds
        self.recorded.append((topic, now, bytes(raw)))
        if topic.endswith("features"):
            message = deserialize_message(raw, StereoFeaturesMsg)
            self.results.append(((now - nanoseconds(message.header.stamp)) / 1e6, message))

    def _diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if "stereo features" in status.name:
                self.counts = {v.key: v.value for v in status.values}


def nanoseconds(stamp: TimeMsg) -> int:
    """A time stamp in nanoseconds."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def run_demo(out: Path, frames: int = 100, rate: float = 10.0) -> dict:
    """Run the demo and write overlay.png, stream.gif, bag and demo.json to `out`.

    Returns:
        The content of demo.json.

    Raises:
        RuntimeError: the node or the replay ended early, or no features were received.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    environment = private_environment()
    environment["KP_DEMO_LISTENERS"] = "2"
    os.environ.update(environment)
    rclpy.init()
    listener = Listener()
    parameters = str(share_folder() / "config" / "stereo.yaml")
    node_command = (
        *("kp_frontend.ros.node", "--ros-args", "--params-file", parameters),
        # The transport then loses nothing, so the table counts drops of the node.
        *("-p", "reliable:=true"),
    )
    replay_command = ("kp_frontend.tools.demo", "--frames", str(frames), "--rate", str(rate))
    begin = time.monotonic()
    with (
        Progress(console=console, transient=True) as bar,
        process(*node_command, environment=environment, log=out / "node.log") as node,
        process(*replay_command, environment=environment, log=out / "replay.log") as replay,
    ):
        task = bar.add_task("starting the node", total=frames)
        while replay.poll() is None:
            rclpy.spin_once(listener, timeout_sec=0.1)
            sent = sum(topic == "left/image" for topic, _, _ in listener.recorded)
            bar.update(task, completed=sent, description="streaming" if sent else None)
            check_alive(node, out / "node.log", "the node")
            if not sent and time.monotonic() - begin > NODE_START_SECONDS:
                raise RuntimeError(f"the node is not ready after {NODE_START_SECONDS:.0f} s")
        if replay.returncode != 0:
            check_alive(replay, out / "replay.log", "the replay")
        settled = time.monotonic() + 2.5  # for the last pairs and one more diagnostics message
        while time.monotonic() < settled:
            rclpy.spin_once(listener, timeout_sec=0.1)
        check_alive(node, out / "node.log", "the node")
    listener.destroy_node()
    rclpy.try_shutdown()
    if not listener.results:
        raise RuntimeError(f"no features were received; see the node's log, {out / 'node.log'}")
    numbers = measure(listener, frames)
    draw(listener, out)
    write_bag(listener, out / "bag")
    (out / "demo.json").write_text(json.dumps(numbers, indent=1) + "\n")
    console.print(table(numbers))
    console.print(
        f"See {out / 'overlay.png'} (matches coloured by depth), {out / 'stream.gif'} (the stream) "
        f"and {out / 'bag'} (kp bag info {out / 'bag'}).",
        soft_wrap=True,
    )
    return numbers


def true_disparity(message: StereoFeaturesMsg, pair: Pair) -> np.ndarray:
    """Ground truth at the left keypoint of each match, (M,), NaN where unknown."""
    x = np.array(message.left.x)[message.left_index]
    y = np.array(message.left.y)[message.left_index]
    # The position of the window follows from the principal point.
    column = np.rint(x + CX - message.cx).astype(int)
    row = np.rint(y + CY - message.cy).astype(int)
    height, width = pair.disparity.shape
    return pair.disparity[row.clip(0, height - 1), column.clip(0, width - 1)]


def measure(listener: Listener, frames: int) -> dict:
    """Compute the numbers of the table from the received messages."""
    pair = load_pair()
    errors, depth_errors = [], []
    for _, message in listener.results:
        truth = true_disparity(message, pair)
        errors.append(np.abs(np.array(message.disparity) - truth)[np.isfinite(truth)])
        depth = np.array(message.points).reshape(-1, 3)[:, 2]
        true_depth = FOCAL * BASELINE / (truth + OFFSET)
        relative = np.abs(depth - true_depth) / true_depth
        depth_errors.append(relative[np.isfinite(relative)])
    error, depth_error = np.concatenate(errors), np.concatenate(depth_errors)
    latency = np.array([latency for latency, _ in listener.results])
    stamps = np.array([nanoseconds(m.header.stamp) for _, m in listener.results])
    counts = {k: int(v) for k, v in listener.counts.items() if v.isdigit()}
    return {
        "pairs_sent": frames,
        "pairs_processed": len(listener.results),
        "pairs_dropped": {
            k.removeprefix("dropped_"): v // 2
            for k, v in counts.items()
            if k.startswith("dropped_")
        },
        "backend": listener.counts.get("backend", "unknown"),
        "keypoints": float(np.median([len(m.left.x) for _, m in listener.results])),
        "matches": float(np.median([len(m.left_index) for _, m in listener.results])),
        "matches_within_3px": float((error <= 3).mean()),
        "matches_within_1px": float((error <= 1).mean()),
        "disparity_error_px": float(np.median(error)),
        "depth_error": float(np.median(depth_error)),
        "latency_ms": {
            "median": float(np.median(latency)),
            "p95": float(np.percentile(latency, 95)),
        },
        "frame_rate_hz": (len(stamps) - 1) / float(np.ptp(stamps) / 1e9)
        if len(stamps) > 1
        else 0.0,
    }


def table(numbers: dict) -> Table:
    """The numbers as a table."""
    dropped = ", ".join(f"{n} {why}" for why, n in numbers["pairs_dropped"].items() if n)
    rows = {
        "pairs sent": numbers["pairs_sent"],
        "pairs processed": numbers["pairs_processed"],
        "pairs dropped": dropped or "none",
        "backend": numbers["backend"],
        "keypoints in the left image (median)": f"{numbers['keypoints']:.0f}",
        "stereo matches (median)": f"{numbers['matches']:.0f}",
        "matches within 3 px of ground truth": f"{numbers['matches_within_3px']:.1%}",
        "matches within 1 px of ground truth": f"{numbers['matches_within_1px']:.1%}",
        "disparity error (median)": f"{numbers['disparity_error_px']:.2f} px",
        "depth error (median)": f"{numbers['depth_error']:.2%}",
        "latency, time stamp to features": f"median {numbers['latency_ms']['median']:.0f} ms, "
        f"95 % {numbers['latency_ms']['p95']:.0f} ms",
        "frame rate": f"{numbers['frame_rate_hz']:.1f} Hz",
    }
    result = Table(title="Measured in this run", show_header=False)
    for name, value in rows.items():
        result.add_row(name, str(value))
    return result


def overlay(image: np.ndarray, message: StereoFeaturesMsg) -> np.ndarray:
    """The left image with each match coloured by depth, red (near) to blue (far), BGR."""
    xy = np.column_stack([message.left.x, message.left.y])[message.left_index]
    depth = np.array(message.points).reshape(-1, 3)[:, 2]
    low, high = 1 / 6.0, 1 / 2.0  # 1 / metres: depth range of the scene
    canvas = draw_matches(image, xy, (1 / depth - low) / (high - low), scale=2)
    text = (
        f"{len(depth)} matches, red {1 / high:.0f} m and nearer, blue {1 / low:.0f} m and farther"
    )
    cv2.putText(canvas, text, (12, 28), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 5, cv2.LINE_AA)
    cv2.putText(
        canvas, text, (12, 28), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2, cv2.LINE_AA
    )
    return canvas


def draw(listener: Listener, out: Path) -> None:
    """Write overlay.png of a frame in the middle, and stream.gif of all frames."""
    images = {}
    for topic, _, raw in listener.recorded:
        if topic == "left/image":
            message = deserialize_message(raw, Image)
            pixels = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width)
            images[nanoseconds(message.header.stamp)] = pixels
    views = [
        overlay(images[nanoseconds(m.header.stamp)], m)
        for _, m in listener.results
        if nanoseconds(m.header.stamp) in images
    ]
    if not views:
        raise RuntimeError("none of the images of the features was received")
    cv2.imwrite(str(out / "overlay.png"), views[len(views) // 2])
    frames = [
        PilImage.fromarray(cv2.cvtColor(cv2.resize(view, (WIDTH, HEIGHT)), cv2.COLOR_BGR2RGB))
        for view in views[::2]
    ]
    frames[0].save(
        out / "stream.gif", save_all=True, append_images=frames[1:], duration=200, loop=0
    )


def write_bag(listener: Listener, folder: Path) -> None:
    """Write all received messages, inputs and outputs, to a bag: a folder with an MCAP file."""
    from rosbags.rosbag2 import StoragePlugin, Writer  # imported late: only the demo writes bags

    store = typestore()
    if (folder / "metadata.yaml").is_file():  # a bag of an earlier run
        shutil.rmtree(folder)
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {
            topic: writer.add_connection(
                f"/{topic}",
                f"{kind.__module__.split('.')[0]}/msg/{kind.__name__}",
                typestore=store,
            )
            for topic, kind in TOPICS.items()
        }
        for topic, stamp, raw in listener.recorded:
            writer.write(connections[topic], stamp, raw)


def main() -> None:
    """Entry point of the replay process."""
    parser = argparse.ArgumentParser(description="Publish the stereo stream of the demo.")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--rate", type=float, default=10.0, help="Hz")
    arguments = parser.parse_args()
    try:
        replay(arguments.frames, arguments.rate)
    except (KeyboardInterrupt, ExternalShutdownException):
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
