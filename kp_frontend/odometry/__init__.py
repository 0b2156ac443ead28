"""The motion of the camera from the features of its pairs. Nothing here knows ROS."""

from kp_frontend.odometry.config import OdometryConfig
from kp_frontend.odometry.odometry import (
    FIRST_PAIR,
    NOT_NEWER,
    OdometryEstimate,
    Status,
    StereoOdometry,
)

__all__ = [
    "FIRST_PAIR",
    "NOT_NEWER",
    "OdometryConfig",
    "OdometryEstimate",
    "Status",
    "StereoOdometry",
]
