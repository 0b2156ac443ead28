"""The pose of the camera on the robot, from TF or from parameters."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import cv2
import numpy as np
from geometry_msgs.msg import Transform, TransformStamped
from rclpy.node import Node
from rclpy.time import Time

# From a camera's optical axes (x right, y down, z forward) to the axes of its body (x forward, y
# left, z up), as REP 103 defines them.
BODY_FROM_OPTICAL = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], float)


class NoTransform(ValueError):
    """TF has no pose of the camera yet."""


def tf_installed() -> bool:
    """Whether tf2_ros can be imported."""
    return importlib.util.find_spec("tf2_ros") is not None


def mount_of_angles(
    x: float, y: float, z: float, roll: float, pitch: float, yaw: float
) -> np.ndarray:
    """Pose (4, 4) of the optical frame of a camera in the robot's base.

    Args:
        x, y, z: metres, in the base.
        roll, pitch, yaw: radians, orientation of the camera body (x forward). All 0: the camera
            looks along the x axis of the base.
    """
    turn = np.eye(3)
    for axis, angle in enumerate((roll, pitch, yaw)):
        vector = np.zeros(3)
        vector[axis] = angle
        turn = cv2.Rodrigues(vector)[0] @ turn  # about fixed axes, as in URDF
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn, (x, y, z)
    return pose @ BODY_FROM_OPTICAL


def matrix_of(transform: Transform) -> np.ndarray:
    """The pose (4, 4) that a transform describes."""
    t, q = transform.translation, transform.rotation
    half = math.atan2(math.hypot(q.x, q.y, q.z), q.w)
    axis = np.array([q.x, q.y, q.z])
    length = float(np.linalg.norm(axis))
    pose = np.eye(4)
    pose[:3, :3] = cv2.Rodrigues(2 * half * axis / length if length else axis)[0]
    pose[:3, 3] = t.x, t.y, t.z
    return pose


def quaternion_of(turn: np.ndarray) -> tuple[float, float, float, float]:
    """The unit quaternion x, y, z, w of a rotation (3, 3)."""
    vector = cv2.Rodrigues(turn)[0][:, 0]
    angle = float(np.linalg.norm(vector))
    x, y, z = vector * (math.sin(angle / 2) / angle if angle else 0.0)
    return float(x), float(y), float(z), math.cos(angle / 2)


class Tf:
    """Looks up and broadcasts transforms; needs tf2_ros."""

    def __init__(self, node: Node) -> None:
        import tf2_ros

        self._errors = tf2_ros.TransformException
        self._buffer: Any = tf2_ros.Buffer()
        self._listener = tf2_ros.TransformListener(self._buffer, node)
        self._broadcaster: Any = tf2_ros.TransformBroadcaster(node)

    def pose(self, parent: str, child: str) -> np.ndarray:
        """Newest pose (4, 4) of one frame in another.

        Raises:
            NoTransform: TF does not have it.
        """
        try:
            found = self._buffer.lookup_transform(parent, child, Time())
        except self._errors as error:
            raise NoTransform(f"no transform from {parent} to {child}: {error}") from error
        return matrix_of(found.transform)

    def send(self, transform: TransformStamped) -> None:
        """Broadcast a transform."""
        self._broadcaster.sendTransform(transform)
