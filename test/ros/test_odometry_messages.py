"""Estimates as ROS messages: frames of REP 103 and 105, covariances, where the camera is."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from geometry_msgs.msg import Transform
from scipy.spatial.transform import Rotation
from std_msgs.msg import Header

from kp_frontend.odometry import OdometryEstimate, Status
from kp_frontend.ros import mount as mounts
from kp_frontend.ros.odometry_messages import (
    landmarks_message,
    odometry_message,
    transform_message,
)

AHEAD = mounts.mount_of_angles(0, 0, 0, 0, 0, 0)


def estimate(pose, velocity=(0, 0, 0, 0, 0, 0), covariance=None, landmarks=()):
    found = np.eye(6) if covariance is None else covariance
    return OdometryEstimate(
        3_000_000_007, pose, found, np.array(velocity, float), found, Status.TRACKING,
        landmarks=np.reshape(landmarks, (-1, 3)),
    )  # fmt: skip


def moved(shift=(0, 0, 0), turn=(0, 0, 0)):
    pose = np.eye(4)
    pose[:3, 3], pose[:3, :3] = shift, Rotation.from_rotvec(turn).as_matrix()
    return pose


def test_ahead_for_the_camera_is_x_for_the_robot():
    message = odometry_message(
        estimate(moved((0, 0, 2), (0, -0.5, 0)), (0, 0, 3, 0, -1, 0)), AHEAD, "odom", "base"
    )
    assert (message.header.frame_id, message.child_frame_id) == ("odom", "base")
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (3, 7)
    place, turn, twist = (
        message.pose.pose.position, message.pose.pose.orientation, message.twist.twist,
    )  # fmt: skip
    np.testing.assert_allclose((place.x, place.y, place.z), (2, 0, 0), atol=1e-12)
    # A turn to the left is about z, which looks up.
    expected = Rotation.from_rotvec((0, 0, 0.5)).as_quat()
    np.testing.assert_allclose((turn.x, turn.y, turn.z, turn.w), expected, atol=1e-12)
    np.testing.assert_allclose((twist.linear.x, twist.linear.y, twist.linear.z), (3, 0, 0))
    np.testing.assert_allclose((twist.angular.x, twist.angular.y, twist.angular.z), (0, 0, 1))
    transform = transform_message(message)
    assert transform.transform.translation.x == pytest.approx(2)
    assert transform.child_frame_id == "base" and transform.header.frame_id == "odom"


def test_a_camera_beside_the_base_moves_while_the_robot_turns_on_the_spot():
    mount = mounts.mount_of_angles(1.0, 0.5, 0.2, 0, 0.3, 0.4)
    rng = np.random.default_rng(0)
    base = np.eye(4)
    base[:3, :3] = Rotation.from_rotvec((0, 0, 0.7)).as_matrix()
    camera = np.linalg.inv(mount) @ base @ mount
    spread = rng.normal(size=(6, 6))
    spread = spread @ spread.T * 1e-6
    turn_rate = np.array([0, 0, 2.0])
    linear = mount[:3, :3].T @ np.cross(turn_rate, mount[:3, 3])
    velocity = np.concatenate([linear, mount[:3, :3].T @ turn_rate])
    message = odometry_message(estimate(camera, velocity, spread), mount, "odom", "base")
    place, twist = message.pose.pose.position, message.twist.twist
    np.testing.assert_allclose((place.x, place.y, place.z), 0, atol=1e-12)
    np.testing.assert_allclose((twist.linear.x, twist.linear.y, twist.linear.z), 0, atol=1e-12)
    assert twist.angular.z == pytest.approx(2)

    # The covariance is that of errors of the camera which are carried over to the base.
    errors = rng.multivariate_normal(np.zeros(6), spread, 4000)
    carried = []
    for error in errors:
        wrong = camera.copy()
        wrong[:3, 3] += error[:3]
        wrong[:3, :3] = Rotation.from_rotvec(error[3:]).as_matrix() @ camera[:3, :3]
        found = mount @ wrong @ np.linalg.inv(mount)
        angle = Rotation.from_matrix(found[:3, :3] @ base[:3, :3].T).as_rotvec()
        carried.append(np.concatenate([found[:3, 3] - base[:3, 3], angle]))
    expected = np.cov(np.array(carried).T)
    given = np.reshape(message.pose.covariance, (6, 6))
    np.testing.assert_allclose(given, expected, atol=0.1 * np.abs(expected).max())


def test_landmarks_are_in_the_odometry_frame():
    message = landmarks_message(
        estimate(np.eye(4), landmarks=[[1.0, 2, 10], [0, 0, 5]]),
        mounts.mount_of_angles(0.1, 0, 0.3, 0, 0, 0), Header(frame_id="odom"),
    )  # fmt: skip
    points = np.frombuffer(bytes(message.data), "<f4").reshape(-1, 3)
    np.testing.assert_allclose(points, [[10.1, -1, -1.7], [5.1, 0, 0.3]], rtol=1e-6)
    assert (message.width, message.point_step) == (2, 12)


def test_matrices_and_quaternions_agree():
    rng = np.random.default_rng(1)
    for turn in [np.zeros(3), np.array([np.pi, 0, 0]), *rng.normal(size=(20, 3))]:
        matrix = Rotation.from_rotvec(turn).as_matrix()
        transform = Transform()
        q = transform.rotation
        q.x, q.y, q.z, q.w = mounts.quaternion_of(matrix)
        np.testing.assert_allclose(mounts.matrix_of(transform)[:3, :3], matrix, atol=1e-9)


def test_angles_of_the_mount_are_those_of_urdf():
    mount = mounts.mount_of_angles(1, 2, 3, 0.1, 0.2, 0.3)
    body = Rotation.from_euler("xyz", (0.1, 0.2, 0.3)).as_matrix()
    np.testing.assert_allclose(mount[:3, :3], body @ mounts.BODY_FROM_OPTICAL[:3, :3], atol=1e-12)
    np.testing.assert_allclose(mount[:3, 3], (1, 2, 3))


def test_tf_is_asked_and_told(monkeypatch):
    """With a tf2_ros of the real one's interface, which has no wheel."""

    class NotThere(Exception):
        pass

    class Buffer:
        def lookup_transform(self, parent, child, when):
            if child != "left_optical":
                raise NotThere("frame does not exist")
            found = types.SimpleNamespace(transform=Transform())
            found.transform.translation.x = 4.0
            found.transform.rotation.w = 1.0
            return found

    sent = []
    fake = types.ModuleType("tf2_ros")
    fake.Buffer, fake.TransformException = Buffer, NotThere
    fake.TransformListener = lambda buffer, node: None
    fake.TransformBroadcaster = lambda node: types.SimpleNamespace(sendTransform=sent.append)
    monkeypatch.setitem(sys.modules, "tf2_ros", fake)
    tf = mounts.Tf(None)
    np.testing.assert_allclose(tf.pose("base", "left_optical"), moved((4, 0, 0)))
    with pytest.raises(mounts.NoTransform, match="no transform from base to other"):
        tf.pose("base", "other")
    tf.send("a transform")
    assert sent == ["a transform"]
