"""Shared by all tests: a real stereo pair, and a real node process to talk to over DDS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import made_world
import numpy as np
import pytest
import rclpy
import skimage.data
from diagnostic_msgs.msg import DiagnosticArray
from kp_msgs.msg import StereoFeatures
from made_bags import COUNT
from sensor_msgs.msg import CameraInfo, Image

from kp_frontend.ros.messages import image_message
from kp_training.evaluation.bags import writer
from kp_training.labels import label_folder

# Engines that tests build stay out of the user's cache, but are shared by the tests' processes.
# Workers of pytest-xdist inherit the folder of the process that started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="kp_engines_")
    os.environ["KP_ENGINE_CACHE"] = _CACHE.name

DOMAIN = 60 + os.getpid() % 40  # of this test run, so that parallel runs do not hear each other

OTHER_DOMAIN = DOMAIN - 40  # for a second node beside a module's own


@pytest.fixture(scope="session")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """A real rectified pair, (240, 320) uint8 each."""
    left, right, _ = skimage.data.stereo_motorcycle()
    return tuple(
        np.ascontiguousarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[120:360, 200:520])
        for image in (left, right)
    )


@pytest.fixture(scope="session")
def training_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four images to train on."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("camera", "brick", "coins", "grass"):
        image = getattr(skimage.data, name)()
        cv2.imwrite(str(folder / f"{name}.png"), cv2.resize(image, (400, 300)))
    return folder


@pytest.fixture(scope="session")
def training_labels(training_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their labels."""
    file = tmp_path_factory.mktemp("labels") / "labels.npz"
    label_folder(training_images, file, views=1)
    return file


@pytest.fixture(scope="session")
def frames() -> list:
    """Frames of a camera that moves along the made wall."""
    return made_world.wall(COUNT)


@pytest.fixture(scope="session")
def bag_path(frames, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bag of them."""
    path = tmp_path_factory.mktemp("bags") / "wall.mcap"
    writer.write_bag(made_world.sequence(frames), path)
    return path


class NodeProcess:
    """The node in a process of its own, with publishers and subscribers for its topics."""

    def __init__(
        self,
        domain: int,
        *parameters: str,
        program: tuple[str, ...] = ("-m", "kp_frontend.ros.node"),
    ) -> None:
        environment = os.environ | {
            "ROS_DOMAIN_ID": str(domain),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        }
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        arguments = [word for p in parameters for word in ("-p", p)]
        self.child = subprocess.Popen(
            [sys.executable, *program, "--ros-args", *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node("test", context=self.context)
        self.executor = rclpy.executors.SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.publishers = self.create_publishers(self.node)
        self.features: list[StereoFeatures] = []
        self.values: dict[str, str] = {}  # of the last diagnostics
        self.counts: dict[str, int] = {}
        self.status = self.name = ""
        self.node.create_subscription(
            StereoFeatures, "kp_frontend/features", self.features.append, 10
        )
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._diagnostics, 10)
        self._stamp = 0
        self.wait(self.heard, 120)

    @staticmethod
    def create_publishers(node: rclpy.node.Node) -> dict[str, rclpy.publisher.Publisher]:
        """The publishers of a stereo camera, by topic."""
        return {
            f"{side}/{name}": node.create_publisher(kind, f"{side}/{name}", 10)
            for side in ("left", "right")
            for name, kind in (("image", Image), ("camera_info", CameraInfo))
        }

    def heard(self) -> bool:
        """Whether the node has subscribed to everything."""
        return all(p.get_subscription_count() for p in self.publishers.values())

    def _diagnostics(self, message: DiagnosticArray) -> None:
        self.status, self.name = message.status[0].message, message.status[0].name
        self.values = {v.key: v.value for v in message.status[0].values}
        self.counts = {k: int(v) for k, v in self.values.items() if v.isdigit()}

    def wait(self, ready: Callable[[], bool], seconds: float = 20.0) -> None:
        """Handle messages until something is so."""
        end = time.monotonic() + seconds
        while not ready():
            assert self.child.poll() is None, "the node died: " + self.child.stderr.read()
            assert time.monotonic() < end, f"not so within {seconds} s; counts {self.counts}"
            self.executor.spin_once(timeout_sec=0.05)

    def image(self, side: str, pixels: np.ndarray, stamp: int, encoding: str = "mono8") -> Image:
        message = image_message(pixels, encoding)
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10**9)
        message.header.frame_id = f"{side}_optical"
        return message

    def start_new_tracks(self) -> None:
        """Let the time stamps jump ahead, so that the next pair does not depend on those before."""
        self._stamp += 20 * 10**9

    def next_stamp(self) -> int:
        self._stamp += 100_000_000
        return self._stamp

    def send(self, **messages: Image | CameraInfo) -> None:
        """Publish messages by topic, with `__` for the slash."""
        for topic, message in messages.items():
            self.publishers[topic.replace("__", "/")].publish(message)

    def send_pair(self, left: np.ndarray, right: np.ndarray, encoding: str = "mono8") -> int:
        stamp = self.next_stamp()
        self.send(
            left__image=self.image("left", left, stamp, encoding),
            right__image=self.image("right", right, stamp, encoding),
        )
        return stamp

    def expect(self, stamp: int) -> StereoFeatures:
        """The features of the pair with this stamp."""

        def found() -> list[StereoFeatures]:
            of = [m.header.stamp for m in self.features]
            return [
                m
                for m, s in zip(self.features, of, strict=True)
                if s.sec * 10**9 + s.nanosec == stamp
            ]

        self.wait(lambda: bool(found()))
        return found()[0]

    def close(self, how: signal.Signals = signal.SIGINT) -> str:
        """Interrupt the node and return what it wrote to stderr; it must end by itself."""
        if self.child.poll() is None:
            self.child.send_signal(how)
        try:
            _, words = self.child.communicate(timeout=20)
        finally:
            if self.child.poll() is None:
                self.child.kill()
                self.child.wait()
            self.executor.shutdown()
            self.node.destroy_node()
            rclpy.shutdown(context=self.context)
        return words


@pytest.fixture(scope="module")
def stereo_node(request: pytest.FixtureRequest):
    """A running node that has seen nothing yet; it must still run when the module's tests end."""
    node = NodeProcess(
        DOMAIN, "backend:=torch", "threads:=1", "image_width:=320", "image_height:=240",
        "max_keypoints:=512", "reliable:=true",
    )  # fmt: skip
    yield node
    assert node.child.poll() is None, "the node died"
    words = node.close()
    assert node.child.returncode == 0, words
    assert "images: received" in words
