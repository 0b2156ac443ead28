"""Settings of the odometry."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from kp_frontend.settings import check, setting

SOLVERS = ("poselib", "opencv")

_setting = partial(setting, fixed=True)  # nothing changes while the odometry runs


@dataclass(frozen=True)
class OdometryConfig:
    """Settings of the odometry. Distances are in pixels unless stated otherwise."""

    solver: str = _setting(
        "auto", "RANSAC pose solver; auto: poselib if it is installed, else opencv",
        choices=("auto", *SOLVERS),
    )  # fmt: skip
    smoothing: bool = _setting(
        True, "refine the keyframes with GTSAM; false: frame-to-frame odometry only"
    )
    window: int = _setting(8, "number of keyframes in the window of the smoother", 2, 100)
    landmarks: int = _setting(
        150, "maximum number of landmarks observed in one keyframe", 10, 10000
    )
    min_observations: int = _setting(
        2, "number of keyframes that must observe a point before it becomes a landmark", 2, 100
    )
    keyframe_parallax: float = _setting(
        2.0,
        "image motion of the near points, without rotation, that triggers a keyframe, in pixels; "
        "0: every frame",
        0.0,
        1e4,
    )
    keyframe_overlap: float = _setting(
        0.7,
        "share of the last keyframe's points that are still seen, below which a keyframe is made",
        0.0,
        1.0,
    )
    inlier_threshold: float = _setting(
        1.5, "maximum reprojection error of an inlier in pixels", 0.1, 100.0
    )
    min_inliers: int = _setting(12, "minimum number of inliers of a motion", 6, 10000)
    link_similarity: float = _setting(
        0.5,
        "minimum cosine similarity to match points without a common track; 1 disables this",
        -1.0,
        1.0,
    )
    link_reach: float = _setting(
        0.25,
        "maximum motion of such a point between frames, as a share of the image width",
        0.0,
        1.0,
    )
    position_sigma: float = _setting(
        0.35,
        "standard deviation of a position in pixels, used if the features have none",
        0.05,
        100.0,
    )
    disparity_sigma: float = _setting(
        0.2,
        "standard deviation of a disparity in pixels, used if the features have none",
        0.05,
        100.0,
    )
    # The root mean square of nine Middlebury and ETH3D scenes' median disparity errors is .09 px.
    calibration_sigma: float = _setting(
        0.1,
        "expected constant error of the disparities in pixels, from the calibration; the odometry "
        "estimates it; 0: it does not",
        0.0,
        100.0,
    )
    max_gap: float = _setting(
        1.0,
        "maximum time in seconds for which the pose is predicted if the motion is unknown",
        0.0,
        1e3,
    )
    acceleration: float = _setting(
        3.0, "standard deviation of the acceleration during prediction in m/s^2", 0.0, 1e3
    )
    angular_acceleration: float = _setting(
        3.0, "standard deviation of the angular acceleration during prediction in rad/s^2", 0.0, 1e3
    )

    def __post_init__(self) -> None:
        check(self)
