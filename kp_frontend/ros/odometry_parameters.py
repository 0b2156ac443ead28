"""Parameters of the odometry node, beside those of `OdometryConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from kp_frontend.odometry import OdometryConfig
from kp_frontend.settings import check, setting

ANGLE = 6.3  # radians; a little more than a turn


@dataclass(frozen=True)
class OdometryNodeConfig:
    """Parameters of the odometry node beside those of `OdometryConfig`."""

    odom_frame: str = setting("odom", "frame in which the robot's pose is given", fixed=True)
    base_frame: str = setting("base_link", "frame of the robot whose pose is given", fixed=True)
    publish_tf: bool = setting(
        True, "send odom_frame to base_frame to TF; needs tf2_ros", fixed=True
    )
    mount: str = setting(
        "auto", "source of the camera's pose in base_frame; auto: tf if tf2_ros is installed",
        choices=("auto", "tf", "parameters"), fixed=True,
    )  # fmt: skip
    camera_x: float = setting(0.0, "metres; camera in base_frame, for mount=parameters",
                              -1e3, 1e3, fixed=True)  # fmt: skip
    camera_y: float = setting(0.0, "metres", -1e3, 1e3, fixed=True)
    camera_z: float = setting(0.0, "metres", -1e3, 1e3, fixed=True)
    camera_roll: float = setting(
        0.0, "radians; 0, 0, 0: it looks along the base's x axis", -ANGLE, ANGLE, fixed=True
    )
    camera_pitch: float = setting(0.0, "radians; positive looks down", -ANGLE, ANGLE, fixed=True)
    camera_yaw: float = setting(0.0, "radians; positive looks left", -ANGLE, ANGLE, fixed=True)
    path_length: int = setting(2000, "poses in ~/path, the newest ones", 1, 1000000, fixed=True)

    def __post_init__(self) -> None:
        check(self)
        if not self.odom_frame or not self.base_frame:
            raise ValueError("odom_frame and base_frame must have a name")


ODOMETRY_CONFIGS = (OdometryNodeConfig, OdometryConfig)
