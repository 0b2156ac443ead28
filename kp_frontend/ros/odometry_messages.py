"""Estimates of the odometry as ROS messages, in the frames of REP 103 and REP 105."""

from __future__ import annotations

from array import array

import numpy as np
from geometry_msgs.msg import PoseStamped, TransformStamped
from nav_msgs.msg import Odometry
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import Header

from kp_frontend.odometry import OdometryEstimate
from kp_frontend.odometry.motion import inverse
from kp_frontend.ros.mount import quaternion_of


def base_pose(estimate: OdometryEstimate, mount: np.ndarray) -> np.ndarray:
    """Pose (4, 4) of the robot's base in the odometry frame, which is the base's first pose.

    Args:
        mount: (4, 4) pose of the camera's optical frame in the base.
    """
    return mount @ estimate.pose @ inverse(mount)


def odometry_message(
    estimate: OdometryEstimate, mount: np.ndarray, odom_frame: str, base_frame: str
) -> Odometry:
    """Pose in the odometry frame and twist in the base, both with covariance."""
    pose = base_pose(estimate, mount)
    turn, lever = mount[:3, :3], mount[:3, 3]
    message = Odometry(child_frame_id=base_frame)
    message.header.frame_id = odom_frame
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(estimate.stamp, 10**9)
    _fill_pose(message.pose.pose, pose)
    # The camera's errors, turned into the odometry's axes, and moved from the camera to the base.
    to_base = _motion_of_base(turn, pose[:3, :3] @ lever)
    message.pose.covariance = (to_base @ estimate.covariance @ to_base.T).ravel()
    to_base = _motion_of_base(turn, lever)
    linear, angular = np.split(to_base @ estimate.velocity, 2)
    twist = message.twist.twist
    twist.linear.x, twist.linear.y, twist.linear.z = linear.tolist()
    twist.angular.x, twist.angular.y, twist.angular.z = angular.tolist()
    message.twist.covariance = (to_base @ estimate.velocity_covariance @ to_base.T).ravel()
    return message


def _motion_of_base(turn: np.ndarray, lever: np.ndarray) -> np.ndarray:
    """Matrix (6, 6) that converts a small motion of the camera to that of the base.

    Motions are linear before angular.

    Args:
        turn: (3, 3) rotation from the axes of the camera's motion to those of the base's motion.
        lever: (3,) vector from the base to the camera, along the axes of the base's motion.
    """
    x, y, z = lever
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    result = np.zeros((6, 6))
    result[:3, :3] = result[3:, 3:] = turn
    result[:3, 3:] = cross @ turn  # the base moves by the camera's motion less turn x lever
    return result


def pose_message(odometry: Odometry) -> PoseStamped:
    """The pose of an odometry message for a path."""
    return PoseStamped(header=odometry.header, pose=odometry.pose.pose)


def transform_message(odometry: Odometry) -> TransformStamped:
    """The pose of an odometry message as a transform."""
    message = TransformStamped(header=odometry.header, child_frame_id=odometry.child_frame_id)
    place, to = odometry.pose.pose.position, message.transform.translation
    to.x, to.y, to.z = place.x, place.y, place.z
    message.transform.rotation = odometry.pose.pose.orientation
    return message


def landmarks_message(estimate: OdometryEstimate, mount: np.ndarray, header: Header) -> PointCloud2:
    """The landmarks in the odometry frame."""
    points = estimate.landmarks @ mount[:3, :3].T + mount[:3, 3]
    message = PointCloud2(header=header, height=1, width=len(points), is_dense=True)
    message.fields = [
        PointField(name=name, offset=4 * i, datatype=PointField.FLOAT32, count=1)
        for i, name in enumerate("xyz")
    ]
    message.point_step, message.row_step = 12, 12 * len(points)
    message.data = array("B", np.ascontiguousarray(points, "<f4").tobytes())
    return message


def _fill_pose(message: object, pose: np.ndarray) -> None:
    place, turn = message.position, message.orientation  # type: ignore[attr-defined]
    place.x, place.y, place.z = pose[:3, 3].tolist()
    turn.x, turn.y, turn.z, turn.w = quaternion_of(pose[:3, :3])
