"""The odometry node as a process of its own: features over DDS in, odometry out."""

from __future__ import annotations

import signal
from dataclasses import replace

import numpy as np
import pytest
from conftest import DOMAIN, NodeProcess
from diagnostic_msgs.msg import DiagnosticStatus
from kp_msgs.msg import StereoFeatures
from made_views import corridor, pose, view
from nav_msgs.msg import Odometry, Path
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header
from std_srvs.srv import Trigger

from kp_frontend.odometry import Status
from kp_frontend.ros.messages import stereo_message
from kp_frontend.ros.odometry_node import judge, main
from kp_frontend.ros.odometry_worker import REASONS, Report

STEP = pose((0, 0, 0.2))


class Follower(NodeProcess):
    """The odometry node with a sender of features."""

    def __init__(self, *parameters):
        super().__init__(DOMAIN, *parameters, program=("-m", "kp_frontend.ros.odometry_node"))
        self.odometry, self.paths, self.clouds = [], [], []
        self.node.create_subscription(Odometry, "odom", self.odometry.append, 10)
        self.node.create_subscription(Path, "stereo_odometry/path", self.paths.append, 10)
        topic = "stereo_odometry/landmarks"
        self.node.create_subscription(PointCloud2, topic, self.clouds.append, 10)
        self.reset = self.node.create_client(Trigger, "stereo_odometry/reset")
        self.world, self.at = corridor(), np.eye(4)
        self.sequence = self.sent = 0
        names = ("odom", "stereo_odometry/path", topic)
        self.wait(lambda: all(self.node.count_publishers(name) for name in names))

    @staticmethod
    def create_publishers(node):
        return {"features": node.create_publisher(StereoFeatures, "features", 10)}

    def message(self, features, stamp=None):
        header = Header(frame_id="left_optical")
        stamp = self.next_stamp() if stamp is None else stamp
        header.stamp.sec, header.stamp.nanosec = divmod(stamp, 10**9)
        message = stereo_message(features, header, header, self.sequence, "float16")
        self.sequence += 1
        self.sent += 1
        return message

    def count(self, name):
        return self.counts.get(name, 0)

    def step(self, change=lambda features: features):
        """Go on by a step and wait for the estimate."""
        self.at = self.at @ STEP
        before = len(self.odometry)
        self.send(features=self.message(change(view(self.world, self.at))))
        self.wait(lambda: len(self.odometry) > before)
        return self.odometry[-1]


@pytest.fixture(scope="module")
def follower():
    node = Follower("camera_x:=0.5", "camera_z:=0.3", "odom_frame:=world", "base_frame:=robot")
    yield node
    assert node.child.poll() is None, "the node died"
    words = node.close()
    assert node.child.returncode == 0, words
    assert "features: received" in words


def test_features_become_odometry(follower):
    messages = [follower.step() for _ in range(6)]
    message = messages[-1]
    assert (message.header.frame_id, message.child_frame_id) == ("world", "robot")
    assert message.header.stamp.sec * 10**9 + message.header.stamp.nanosec == follower._stamp
    place = message.pose.pose.position
    np.testing.assert_allclose((place.x, place.y, place.z), (5 * 0.2, 0, 0), atol=1e-3)
    assert message.twist.twist.linear.x == pytest.approx(2.0, abs=0.01)
    covariance = np.reshape(message.pose.covariance, (6, 6))
    assert (np.linalg.eigvalsh(covariance) > 0).all() and covariance.max() < 1e-2
    follower.wait(lambda: bool(follower.paths) and bool(follower.clouds))
    assert follower.paths[-1].header.frame_id == "world"
    assert follower.clouds[-1].width > 50
    follower.wait(lambda: follower.count("processed") == 6)
    assert follower.status == "tracking"
    assert abs(float(follower.values["disparity_offset_px"])) < 0.05


def test_what_cannot_be_used_is_counted_and_nothing_dies(follower):
    processed = follower.count("processed")
    bad = follower.message(view(follower.world, follower.at))
    bad.left_index[0] = 60_000
    follower.send(features=bad)
    follower.wait(lambda: follower.count("dropped_malformed") == 1)
    follower.send(features=follower.message(view(follower.world, follower.at), stamp=1))
    follower.wait(lambda: follower.count("dropped_old") == 1)
    assert follower.status == "features are dropped: time stamp is not newer than the last one"
    follower.sequence += 7
    lost = follower.step(lambda features: replace(features, calibration=None))
    assert lost.pose.covariance[0] > 1e-5  # predicted
    follower.wait(lambda: follower.count("missed") == 7 and "no calibration" in follower.status)
    assert follower.status.startswith("lost for")
    follower.sequence = 0
    follower.step()
    follower.wait(lambda: follower.count("restarts") == 1)
    follower.wait(lambda: follower.count("processed") == processed + 2)
    total = sum(follower.count(f"dropped_{reason}") for reason in REASONS)
    assert follower.count("received") == follower.count("processed") + total


def test_bad_points_and_ids_are_counted_and_the_pose_goes_on(follower):
    before = {name: follower.count(name) for name in ("without_depth", "repeated_track_id")}

    def damage(features):
        points, ids = features.points.copy(), features.left.track_ids.copy()
        points[:20] = np.nan
        ids[100:110] = ids[90]
        sigma = features.left.sigma.copy()
        sigma[:5], sigma[5:10] = np.inf, 1e30
        left = replace(features.left, track_ids=ids, sigma=sigma)
        return replace(features, points=points, left=left)

    first = follower.step()
    message = follower.step(damage)
    assert message.twist.twist.linear.x == pytest.approx(2.0, abs=0.01)
    moved = message.pose.pose.position.x - first.pose.pose.position.x
    assert moved == pytest.approx(0.2, abs=1e-3)
    follower.wait(lambda: follower.count("without_depth") == before["without_depth"] + 20)
    assert follower.count("repeated_track_id") == before["repeated_track_id"] + 11


def test_time_that_stands_still_or_jumps_is_counted(follower):
    follower.step()
    old, published = follower.count("dropped_old"), len(follower.odometry)
    again = view(follower.world, follower.at)
    follower.send(features=follower.message(again, stamp=follower._stamp))
    follower.wait(lambda: follower.count("dropped_old") == old + 1)
    assert len(follower.odometry) == published
    follower.send(features=follower.message(again, stamp=0))
    follower.wait(lambda: follower.count("dropped_malformed") == 2)
    # A recording starts again: the pose goes on from where it was, but less certain.
    begin = follower._stamp
    follower._stamp += 20 * 10**9
    place = follower.step().pose.pose.position.x
    follower._stamp = begin
    back = follower.step()
    assert back.pose.pose.position.x == pytest.approx(place, abs=1e-3)
    assert back.pose.covariance[0] > 0.1
    follower.wait(lambda: follower.count("time_jumped_back") == 1)
    assert follower.step().twist.twist.linear.x == pytest.approx(2.0, abs=0.01)


def test_a_restarted_front_end_with_another_network(follower):
    follower.step()
    restarts, follower.sequence = follower.count("restarts"), 0

    def other(features):
        left = features.left
        ids = (left.track_ids + np.uint32(500)) % np.uint32(3000) + np.uint32(1)
        return replace(
            features, left=replace(left, track_ids=ids, descriptors=left.descriptors[:, :32])
        )

    # Neither ids nor descriptors tell what the points were: the pose is predicted once.
    predicted = follower.step(other)
    assert predicted.twist.twist.linear.x == pytest.approx(2.0, abs=0.05)
    message = follower.step(other)
    follower.wait(lambda: follower.count("restarts") == restarts + 1)
    follower.wait(lambda: follower.status == "tracking")
    assert message.twist.twist.linear.x == pytest.approx(2.0, abs=0.05)
    assert not follower.count("dropped_failed")


def test_reset_begins_at_the_origin(follower):
    assert follower.odometry[-1].pose.pose.position.x > 1
    future = follower.reset.call_async(Trigger.Request())
    follower.wait(future.done)
    assert future.result().success
    message = follower.step()
    assert message.pose.pose.position.x == pytest.approx(0, abs=1e-6)
    paths = len(follower.paths)
    follower.wait(lambda: follower.step() and len(follower.paths) > paths)
    origin = follower.paths[-1].poses[0]
    assert origin.header.stamp == message.header.stamp  # what was before the reset is gone


def test_resets_among_features_are_all_at_the_origin(follower):
    """Ten messages and three resets in one go: each message is counted, nothing dies."""
    futures = []
    for i in range(10):
        follower.at = follower.at @ STEP
        follower.send(features=follower.message(view(follower.world, follower.at)))
        if i in (2, 3, 7):
            futures.append(follower.reset.call_async(Trigger.Request()))
    follower.wait(lambda: all(future.done() for future in futures))
    sent = follower.sent + 7  # those of the jump above

    def all_counted():
        arrived = follower.count("received") + follower.count("missed")
        return arrived == sent and not follower.count("waiting")

    follower.wait(all_counted)
    total = sum(follower.count(f"dropped_{reason}") for reason in REASONS)
    assert follower.count("received") == follower.count("processed") + total
    assert not follower.count("dropped_failed")
    # The last reset came before the next message at the latest.
    assert follower.step().pose.pose.position.x < 10.5 * 0.2


@pytest.mark.parametrize(
    ("parameter", "words"),
    [("mount:=tf", "tf2_ros is not installed"), ("window:=1", "window")],
)
def test_what_cannot_start_says_so_in_one_line(parameter, words, capfd):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["--ros-args", "-p", parameter]) == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    lines = [line for line in capfd.readouterr().err.splitlines() if "cannot start" in line]
    assert len(lines) == 1 and words in lines[0]


def report(**values):
    given = {
        "counts": {}, "figures": {}, "status": Status.TRACKING, "reason": "", "lost_for": 0.0,
        "silent_for": 0.0,
    }  # fmt: skip
    return Report(**given | values)


def test_diagnoses():
    assert judge(report(), 1)[0] == DiagnosticStatus.OK
    silent = judge(report(silent_for=4.0), 0)
    assert silent == (DiagnosticStatus.WARN, "no features for 4 s: nobody publishes features")
    unplaced = "no transform from base_link to left_optical"
    dropped = (DiagnosticStatus.WARN, f"features are dropped: {unplaced}")
    assert judge(report(dropped=unplaced), 1) == dropped
    lost = {"status": Status.PREDICTED, "reason": "too few points"}
    assert judge(report(lost_for=1.0, **lost), 1)[0] == DiagnosticStatus.WARN
    level, words = judge(report(lost_for=9.0, **lost), 1)
    assert level == DiagnosticStatus.ERROR and words == "lost for 9.0 s: too few points"
