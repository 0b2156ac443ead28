"""The ROS 2 node: pairs the images of a stereo camera and publishes their features.

The executor's thread pairs messages and leaves the newest pair in a slot; one worker thread takes
it from there, computes and publishes. A pair that is still in the slot when a newer one comes is
replaced and counted, so latency stays bounded when images come faster than they can be processed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from kp_msgs.msg import StereoFeatures as StereoFeaturesMsg
from rcl_interfaces.msg import ParameterDescriptor
from rclpy._rclpy_pybind11 import RCLError, RCLInvalidROSArgsError, UnknownROSArgsError
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image

from kp_frontend.calibration import StereoCalibration
from kp_frontend.frontend import FrontendConfig, StereoFrontend
from kp_frontend.ros import standins
from kp_frontend.ros.messages import DESCRIPTOR_TYPES, calibration_from_info, stereo_message

standins.put_on_path()
import message_filters  # noqa: E402  the real one, or ours where it is missing
from cv_bridge import CvBridge, CvBridgeError  # noqa: E402

CANNOT_START = (
    ValueError,
    ParameterException,
    RCLError,
    RCLInvalidROSArgsError,
    UnknownROSArgsError,
)
INFO_PATIENCE = 0.02  # seconds that a pair waits for a camera_info of its own stamp
INFOS_KEPT = 30  # camera_infos remembered per camera


@dataclass(frozen=True)
class NodeConfig:
    """Parameters of the node beside those of `FrontendConfig`."""

    image_width: int = 640  # size that the engine is made ready for at start; any size works
    image_height: int = 480
    approximate_sync: bool = False  # pair images by nearest stamp instead of by equal stamp
    sync_slop: float = 0.01  # seconds; stamps of an approximate pair differ by less than this
    queue_size: int = 10  # images of each camera that wait for their partner
    reliable: bool = False  # ask for reliable delivery of images instead of best effort
    descriptor_type: str = "float32"  # float32, float16 or int8, in the message

    def __post_init__(self) -> None:
        if self.queue_size < 1:
            raise ValueError(f"queue_size is {self.queue_size}, must be at least 1")
        if not self.sync_slop > 0:
            raise ValueError(f"sync_slop is {self.sync_slop}, must be above 0")
        if self.descriptor_type not in DESCRIPTOR_TYPES:
            raise ValueError(f"descriptor_type must be one of {', '.join(DESCRIPTOR_TYPES)}")


def stamp_ns(message: Image | CameraInfo) -> int:
    """Stamp of a message in nanoseconds."""
    return message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec


class CameraInfos:
    """Camera infos of both cameras by stamp; written by the executor, read by the worker."""

    def __init__(self) -> None:
        self._recent = tuple(deque[CameraInfo](maxlen=INFOS_KEPT) for _ in range(2))
        self._news = threading.Condition()

    def add(self, side: int, info: CameraInfo) -> None:
        """Remember an info of the left (0) or right (1) camera."""
        with self._news:
            self._recent[side].append(info)
            self._news.notify_all()

    def of_pair(self, left: Image, right: Image) -> tuple[CameraInfo, CameraInfo] | None:
        """Infos with the stamps of a pair, waited for a little; else the newest; None if none."""

        def exact() -> list[CameraInfo] | None:
            found = [
                next((i for i in reversed(infos) if stamp_ns(i) == stamp_ns(image)), None)
                for infos, image in zip(self._recent, (left, right), strict=True)
            ]
            return None if None in found else found

        with self._news:
            if not all(self._recent):
                return None
            found = self._news.wait_for(exact, INFO_PATIENCE)
            return tuple(found or (infos[-1] for infos in self._recent))


class Accounts:
    """Where every image received ended. Written by two threads.

    Args:
        waiting: how many images wait in the synchroniser for their partner; what it gave up is
            the rest, whatever its rules are.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._lock = threading.Lock()
        self._waiting = waiting
        self.received = 0
        self.refused = 0  # before synchronisation
        self.paired = 0
        self.processed = 0
        self.dropped: Counter[str] = Counter()  # after synchronisation

    def arrived(self, good: bool) -> None:
        """An image came in, and goes on to the synchroniser if it is good."""
        with self._lock:
            self.received += 1
            self.refused += not good

    def found_partner(self) -> None:
        """Two images found each other."""
        with self._lock:
            self.paired += 2

    def ended(self, reason: str | None = None) -> None:
        """A pair was processed, or dropped for a reason."""
        with self._lock:
            if reason is None:
                self.processed += 2
            else:
                self.dropped[reason] += 2

    def snapshot(self) -> dict[str, int]:
        """Counters at one moment, taken in the thread that receives images.

        `waiting` are images that wait for a partner or for the worker.
        """
        with self._lock:
            waiting = self._waiting()
            reasons = Counter(self.dropped)
            reasons["bad"] += self.refused
            reasons["unpaired"] += self.received - self.refused - self.paired - waiting
            dropped = sum(reasons.values())
            return {
                "received": self.received,
                "processed": self.processed,
                "dropped": dropped,
                **{f"dropped_{reason}": n for reason, n in sorted(reasons.items()) if n},
                "waiting": self.received - self.processed - dropped,
            }


class StereoNode(Node):
    """Subscribes to a stereo camera, publishes `~/features` and `/diagnostics`.

    Raises:
        ValueError: a parameter, the weights or the backend cannot be used.
    """

    def __init__(self) -> None:
        super().__init__("kp_frontend")
        self.settings = self._declare(NodeConfig)
        self.frontend = StereoFrontend(self._declare(FrontendConfig))
        begin = time.perf_counter()
        self.frontend.warm_up(self.settings.image_height, self.settings.image_width)
        self.get_logger().info(
            f"{self.frontend.config.model} on {self.frontend.backend} is ready after "
            f"{time.perf_counter() - begin:.1f} s"
        )
        self.bridge = CvBridge()
        self.infos = CameraInfos()
        self.accounts = Accounts(lambda: sum(len(queue) for queue in self._sync.queues))
        self.sequence = 0
        self._slot: tuple[Image, Image] | None = None
        self._work = threading.Condition()
        self._stopping = False
        self._last_pair = time.monotonic()

        self.features_publisher = self.create_publisher(StereoFeaturesMsg, "~/features", 5)
        self.diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 5)
        self.create_timer(1.0, self._publish_diagnostics)
        self._subscribe()
        self._worker = threading.Thread(target=self._run, name="worker")
        self._worker.start()

    def _declare(self, kind: type) -> NodeConfig | FrontendConfig:
        """Declare a parameter for each field of a config and make the config of their values."""
        values = {}
        for f in fields(kind):
            descriptor = ParameterDescriptor(read_only=True)
            values[f.name] = self.declare_parameter(f.name, f.default, descriptor).value
        return kind(**values)

    def _subscribe(self) -> None:
        c = self.settings
        reliability = ReliabilityPolicy.RELIABLE if c.reliable else ReliabilityPolicy.BEST_EFFORT
        qos = QoSProfile(depth=c.queue_size, reliability=reliability)
        images = []
        self._info_subscribers, self._image_subscribers = [], []
        for side, name in enumerate(("left", "right")):
            # Infos first: one that comes with its image is then there before it.
            infos = message_filters.Subscriber(
                self, CameraInfo, f"{name}/camera_info", qos_profile=qos
            )
            infos.registerCallback(partial(self.infos.add, side))
            self._info_subscribers.append(infos)
            image = message_filters.Subscriber(self, Image, f"{name}/image", qos_profile=qos)
            gate = message_filters.SimpleFilter()
            image.registerCallback(partial(self._on_image, gate))
            self._image_subscribers.append(image)
            images.append(gate)
        if c.approximate_sync:
            self._sync = message_filters.ApproximateTimeSynchronizer(
                images, c.queue_size, c.sync_slop
            )
        else:
            self._sync = message_filters.TimeSynchronizer(images, c.queue_size)
        self._sync.registerCallback(self._on_pair)

    def _on_image(self, gate: message_filters.SimpleFilter, image: Image) -> None:
        # A time before the epoch would be an error in the synchroniser.
        good = image.header.stamp.sec >= 0
        self.accounts.arrived(good)
        if good:
            gate.signalMessage(image)
        else:
            self._warn(f"image dropped: its stamp is negative, {image.header.stamp.sec} s")

    def _on_pair(self, left: Image, right: Image) -> None:
        # What is older than a pair is not waited for: pairs are published in order.
        for queue, image in zip(self._sync.queues, (left, right), strict=True):
            for stamp in [stamp for stamp in queue if stamp < stamp_ns(image)]:
                del queue[stamp]
        self.accounts.found_partner()
        self._last_pair = time.monotonic()
        with self._work:
            if self._slot is not None:
                self.accounts.ended("replaced")
            self._slot = (left, right)
            self._work.notify()

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._slot is not None or self._stopping)
                if self._stopping:
                    return
                left, right = self._slot
                self._slot = None
            try:
                self._process(left, right)
            except (CvBridgeError, ValueError, TypeError, KeyError) as error:
                self.accounts.ended("bad")
                self._warn(f"pair dropped: {error}")
            except Exception as error:  # whatever one pair did, the next one shall have its chance
                if self._stopping or not rclpy.ok():
                    return
                self.accounts.ended("failed")
                self._warn(f"pair dropped, {type(error).__name__}: {error}")

    def _process(self, left: Image, right: Image) -> None:
        begin = time.perf_counter()
        greys = [self._grey(name, image) for name, image in (("left", left), ("right", right))]
        calibration = self._calibration(left, right)
        decoded = time.perf_counter()
        result = self.frontend(*greys, calibration)
        result.stage_ms["decode"] = 1e3 * (decoded - begin)
        message = stereo_message(
            result, left.header, right.header, self.sequence, self.settings.descriptor_type
        )
        self.features_publisher.publish(message)
        self.sequence += 1
        self.accounts.ended()

    def _grey(self, name: str, image: Image):
        if image.width * image.height == 0:
            raise ValueError(f"the {name} image is empty")
        if len(image.data) < image.step * image.height:
            raise ValueError(
                f"the {name} image has {len(image.data)} bytes, its step and height ask for "
                f"{image.step * image.height}"
            )
        return self.bridge.imgmsg_to_cv2(image, "mono8")

    def _calibration(self, left: Image, right: Image) -> StereoCalibration | None:
        infos = self.infos.of_pair(left, right)
        if infos is None:
            return None
        try:
            for info, image in zip(infos, (left, right), strict=True):
                if (info.width, info.height) not in ((0, 0), (image.width, image.height)):
                    raise ValueError(
                        f"it is for {info.width}x{info.height}, the image has "
                        f"{image.width}x{image.height}"
                    )
            return calibration_from_info(*infos)
        except ValueError as error:
            self._warn(f"no depth, camera_info cannot be used: {error}")
            return None

    def _warn(self, text: str) -> None:
        self.get_logger().warning(text, throttle_duration_sec=1.0)

    def _publish_diagnostics(self) -> None:
        counts = self.accounts.snapshot()
        status = DiagnosticStatus(name=f"{self.get_name()}: stereo features", hardware_id="none")
        silent = time.monotonic() - self._last_pair
        if silent > 3.0:
            status.level = DiagnosticStatus.WARN
            status.message = f"no stereo pair for {silent:.0f} s: {self._why_no_pairs(counts)}"
        else:
            status.level, status.message = DiagnosticStatus.OK, "stereo features flow"
        values = {**counts, "backend": self.frontend.backend, "model": self.frontend.config.model}
        status.values = [KeyValue(key=k, value=str(v)) for k, v in values.items()]
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self.diagnostics_publisher.publish(message)

    def _why_no_pairs(self, counts: dict[str, int]) -> str:
        publishers = {n: self.count_publishers(f"{n}/image") for n in ("left", "right")}
        missing = [self.resolve_topic_name(f"{n}/image") for n, k in publishers.items() if not k]
        if missing:
            return f"nobody publishes {' and '.join(missing)}"
        if counts["received"] == 0:
            return "images are published but none arrives; are the QoS settings compatible?"
        return f"{counts.get('dropped_unpaired', 0)} images without a partner of the same stamp"

    def stop(self) -> None:
        """End the worker and say where all images ended."""
        with self._work:
            self._stopping = True
            if self._slot is not None:
                self.accounts.ended("shutdown")
                self._slot = None
            self._work.notify()
        self._worker.join()
        for queue in self._sync.queues:
            queue.clear()  # what waited for a partner found none
        counts = self.accounts.snapshot()
        print("images: " + ", ".join(f"{k} {v}" for k, v in counts.items()), file=sys.stderr)


def main(args: list[str] | None = None) -> int:
    """Run the node until it is interrupted; exit status 1 if it cannot start."""
    try:
        rclpy.init(args=args)
        node = StereoNode()
    except CANNOT_START as error:
        print(f"kp_frontend cannot start: {' '.join(str(error).split())}", file=sys.stderr)
        rclpy.try_shutdown()
        return 1
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        node.get_logger().debug("interrupted")
    finally:
        node.stop()
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
