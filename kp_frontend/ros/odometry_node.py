"""The odometry node: publishes the pose of the robot, its path and the landmarks from features.

It only needs `features`, so it works next to the front end, on another machine, or on a recording
of features. The executor's thread puts the newest message into a queue of length one. A worker
thread runs the odometry.
"""

from __future__ import annotations

import sys
import time
from collections import deque

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped
from kp_msgs.msg import StereoFeatures as StereoFeaturesMsg
from nav_msgs.msg import Odometry, Path
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from sensor_msgs.msg import PointCloud2
from std_srvs.srv import Trigger

from kp_frontend.odometry import (
    FIRST_PAIR,
    OdometryConfig,
    OdometryEstimate,
    Status,
    StereoOdometry,
)
from kp_frontend.ros.diagnostics import LevelLog
from kp_frontend.ros.mount import Tf, mount_of_angles, tf_installed
from kp_frontend.ros.odometry_messages import (
    landmarks_message,
    odometry_message,
    pose_message,
    transform_message,
)
from kp_frontend.ros.odometry_parameters import OdometryNodeConfig
from kp_frontend.ros.odometry_worker import OdometryWorker, Report
from kp_frontend.ros.parameters import declare
from kp_frontend.ros.run_node import run_node

SILENCE = 3.0  # seconds without features after which to warn
LONG_LOST = 5.0  # seconds without a known motion after which to report an error
PATH_PERIOD = 0.5  # seconds between path messages, which are large


class OdometryNode(Node):
    """Subscribes to `features`; publishes `odom`, TF, `~/path`, `~/landmarks`, `/diagnostics`.

    Raises:
        ValueError, rclpy.exceptions.ParameterException: a parameter is invalid.
    """

    def __init__(self) -> None:
        super().__init__("stereo_odometry")
        self.config = OdometryNodeConfig(**declare(self, OdometryNodeConfig))
        self.odometry = StereoOdometry(OdometryConfig(**declare(self, OdometryConfig)))
        self._tf = self._make_tf()
        c = self.config
        self._mount = mount_of_angles(
            c.camera_x, c.camera_y, c.camera_z, c.camera_roll, c.camera_pitch, c.camera_yaw
        )
        self._path: deque[PoseStamped] = deque(maxlen=c.path_length)
        self._path_due = 0.0
        self._odom = self.create_publisher(Odometry, "odom", 10)
        self._path_publisher = self.create_publisher(Path, "~/path", 2)
        self._landmarks = self.create_publisher(PointCloud2, "~/landmarks", 2)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 5)
        self._log = LevelLog(self.get_logger())
        self.worker = OdometryWorker(self.odometry, self._publish, self._say)
        self.create_subscription(StereoFeaturesMsg, "features", self.worker.put, 5)
        self.create_service(Trigger, "~/reset", self._on_reset)
        # A steady clock, so that diagnostics continue in a paused simulation.
        self.create_timer(1.0, self._diagnose, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.get_logger().info(
            f"solver: {self.odometry.solver}, "
            f"smoothing: {'GTSAM' if self.odometry.config.smoothing else 'off'}, "
            f"camera pose from: {'TF' if self._mount_by_tf else 'parameters'}"
        )

    def _make_tf(self) -> Tf | None:
        """TF, if it is installed and needed.

        Raises:
            ValueError: `mount` is `tf`, but tf2_ros is not installed.
        """
        there = tf_installed()
        if self.config.mount == "tf" and not there:
            raise ValueError("mount is tf, but tf2_ros is not installed; set mount to parameters")
        self._mount_by_tf = there and self.config.mount != "parameters"
        if self.config.publish_tf and not there:
            self.get_logger().warning("tf2_ros is not installed: the transform is not broadcast")
        return Tf(self) if there and (self._mount_by_tf or self.config.publish_tf) else None

    def _publish(self, estimate: OdometryEstimate, message: StereoFeaturesMsg) -> None:
        """Publish an estimate. Called in the worker's thread.

        Raises:
            NoTransform: the pose of the camera is not known.
        """
        c = self.config
        if self._tf is not None and self._mount_by_tf:
            self._mount = self._tf.pose(c.base_frame, message.header.frame_id)
        odometry = odometry_message(estimate, self._mount, c.odom_frame, c.base_frame)
        if estimate.status is Status.REJECTED:  # there is no pose before the first pair
            return
        self._odom.publish(odometry)
        if self._tf is not None and c.publish_tf:
            self._tf.send(transform_message(odometry))
        if estimate.reason == FIRST_PAIR:  # after a reset
            self._path.clear()
        self._path.append(pose_message(odometry))
        now = time.monotonic()
        if now >= self._path_due and self._path_publisher.get_subscription_count():
            self._path_due = now + PATH_PERIOD
            self._path_publisher.publish(Path(header=odometry.header, poses=list(self._path)))
        if estimate.keyframe and self._landmarks.get_subscription_count():
            self._landmarks.publish(landmarks_message(estimate, self._mount, odometry.header))

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.worker.reset()
        response.success, response.message = True, "the odometry restarts at the origin"
        return response

    def _say(self, text: str) -> None:
        self.get_logger().warning(text, throttle_duration_sec=1.0)

    def _diagnose(self) -> None:
        report = self.worker.report()
        level, words = judge(report, self.count_publishers("features"))
        self._log(level, words)
        values = {**report.counts, **report.figures, "solver": self.odometry.solver}
        status = DiagnosticStatus(
            level=level,
            name=f"{self.get_fully_qualified_name()}: stereo odometry",
            hardware_id="none",
            message=words,
            values=[KeyValue(key=k, value=str(v)) for k, v in values.items()],
        )
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)

    def stop(self) -> None:
        """End the worker and print the message counters."""
        self.worker.stop()
        counts = self.worker.report().counts
        print("features: " + ", ".join(f"{k} {v}" for k, v in counts.items()), file=sys.stderr)


def judge(report: Report, senders: int) -> tuple[bytes, str]:
    """Level and message of a report.

    Args:
        senders: number of publishers of `features`.
    """
    if report.silent_for > SILENCE:
        why = "nobody publishes features" if not senders else "the front end publishes none"
        return DiagnosticStatus.WARN, f"no features for {report.silent_for:.0f} s: {why}"
    if report.dropped:
        return DiagnosticStatus.WARN, f"features are dropped: {report.dropped}"
    if report.status is None:
        return DiagnosticStatus.WARN, "no features have been processed yet"
    if report.lost_for:
        level = DiagnosticStatus.ERROR if report.lost_for > LONG_LOST else DiagnosticStatus.WARN
        return level, f"lost for {report.lost_for:.1f} s: {report.reason}"
    return DiagnosticStatus.OK, "tracking"


def main(args: list[str] | None = None) -> int:
    """Run the node until it is interrupted; exit status 1 if it cannot start."""
    return run_node("stereo_odometry", OdometryNode, OdometryNode.stop, args)


if __name__ == "__main__":
    sys.exit(main())
