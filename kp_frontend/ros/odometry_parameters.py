"""Parameters of the odometry node that are not in `OdometryConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from kp_frontend.odometry import OdometryConfig
from kp_frontend.settings import check, setting

ANGLE = 6.3  # radians; a little more than a turn


@dataclass(frozen=True)
class OdometryNodeConfig:
    """Parameters of the odometry node that are not in `OdometryConfig`."""

    odom_frame: str = setting("odom", "odometry frame: parent frame of the pose", fixed=True)
    base_frame: str = setting("base_link", "robot frame: child frame of the pose", fixed=True)
    publish_tf: bool = setting(
        True, "broadcast the transform from odom_frame to base_frame; needs tf2_ros", fixed=True
    )
    mount: str = setting(
        "auto", "source of the camera's pose in base_frame; auto: tf if tf2_ros is installed",
        choices=("auto", "tf", "parameters"), fixed=True,
    )  # fmt: skip
    camera_x: float = setting(
        0.0, "x position of the camera in base_frame in metres; used without TF",
        -1e3, 1e3, fixed=True,
    )  # fmt: skip
    camera_y: float = setting(0.0, "y position in metres", -1e3, 1e3, fixed=True)
    camera_z: float = setting(0.0, "z position in metres", -1e3, 1e3, fixed=True)
    camera_roll: float = setting(
        0.0, "roll in radians; with 0, 0, 0 the camera looks along the x axis of base_frame",
        -ANGLE, ANGLE, fixed=True,
    )  # fmt: skip
    camera_pitch: float = setting(
        0.0, "pitch in radians; positive: the camera looks down", -ANGLE, ANGLE, fixed=True
    )
    camera_yaw: float = setting(
        0.0, "yaw in radians; positive: the camera looks left", -ANGLE, ANGLE, fixed=True
    )
    path_length: int = setting(2000, "maximum number of poses in ~/path", 1, 1000000, fixed=True)

    def __post_init__(self) -> None:
        check(self)
        if not self.odom_frame or not self.base_frame:
            raise ValueError("odom_frame and base_frame must have a name")


ODOMETRY_CONFIGS = (OdometryNodeConfig, OdometryConfig)
