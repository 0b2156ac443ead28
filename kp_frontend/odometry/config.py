"""What a user may choose about the odometry."""

from __future__ import annotations

from dataclasses import dataclass

from kp_frontend.settings import check, setting

SOLVERS = ("poselib", "opencv")


@dataclass(frozen=True)
class OdometryConfig:
    """What a user may choose. Distances in pixels unless said."""

    solver: str = setting(
        "auto", "what finds a frame's motion; auto: poselib if installed, else opencv",
        choices=("auto", *SOLVERS), fixed=True,
    )  # fmt: skip
    smoothing: bool = setting(
        True, "refine the keyframes with GTSAM; off: frame to frame only", fixed=True
    )
    window: int = setting(8, "keyframes that are refined together", 2, 100, fixed=True)
    landmarks: int = setting(150, "landmarks observed in one keyframe, at most", 10, 10000)
    min_observations: int = setting(
        2, "keyframes in which a point is seen before it becomes a landmark", 2, 100
    )
    keyframe_parallax: float = setting(
        2.0, "motion of the near points, less rotation, that makes a keyframe; 0: every frame",
        0.0, 1e4,
    )  # fmt: skip
    keyframe_overlap: float = setting(
        0.7, "share of the last keyframe's points below which the next one is made", 0.0, 1.0
    )
    inlier_threshold: float = setting(1.5, "largest reprojection error of an inlier", 0.1, 100.0)
    min_inliers: int = setting(12, "inliers that a motion needs", 6, 10000)
    link_similarity: float = setting(
        0.5, "lowest cosine of descriptors that link points without a common track; 1: no links",
        -1.0, 1.0,
    )  # fmt: skip
    link_reach: float = setting(
        0.25, "share of the width by which such a point may move between frames", 0.0, 1.0
    )
    position_sigma: float = setting(
        0.35, "standard deviation of a position where the features tell none", 0.05, 100.0
    )
    disparity_sigma: float = setting(
        0.2, "standard deviation of a disparity where the features tell none", 0.05, 100.0
    )
    calibration_sigma: float = setting(
        0.2, "standard deviation of what the rig's calibration adds to every disparity", 0.0, 100.0
    )
    max_gap: float = setting(
        1.0, "seconds for which a motion that cannot be told is predicted to go on", 0.0, 1e3
    )
    acceleration: float = setting(
        3.0, "m/s^2; standard deviation by which a predicted velocity changes", 0.0, 1e3
    )
    angular_acceleration: float = setting(
        3.0, "rad/s^2; standard deviation by which a predicted turn rate changes", 0.0, 1e3
    )

    def __post_init__(self) -> None:
        check(self)
