"""What a user may choose about the front end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kp_frontend.backends import BACKENDS, PRECISIONS
from kp_frontend.settings import check, fixed_settings, setting

COORDINATES = ("rectified", "raw")


@dataclass(frozen=True)
class FrontendConfig:
    """What a user may choose. Distances in pixels unless said."""

    model: str = setting("tiny", "released network by name, or a .safetensors file", fixed=True)
    backend: str = setting("auto", "what runs the network", choices=("auto", *BACKENDS), fixed=True)
    precision: str = setting(
        "auto", "of the network, where the backend has it", choices=PRECISIONS, fixed=True
    )
    device: str = setting("cpu", "of the backend torch: cpu, cuda, cuda:1", fixed=True)
    threads: int = setting(0, "of a CPU backend; 0: one per core", 0, 1024, fixed=True)
    max_keypoints: int = setting(1024, "keypoints per image", 2, 65536, fixed=True)
    score_threshold: float = setting(
        0.03, "lowest keypoint score; lower it for more points in dim scenes", 0.0, 1.0
    )
    nms_radius: int = setting(
        2, "pixels without a second keypoint; 3 or 4 spreads them, but fewer repeat", 2, 16,
        fixed=True,
    )  # fmt: skip
    border: int = setting(4, "pixels without keypoints along the edges", 0, 16384, fixed=True)
    row_tolerance: float = setting(
        2.0, "pixels by which a match's rows may differ; raise it for a poor calibration", 0.0, 1e5
    )
    min_depth: float = setting(
        0.1, "metres; nearest depth that is searched, when calibrated", 0.0, 1e9
    )
    max_depth: float = setting(
        math.inf, "metres; farthest depth that is searched, above 0", 0.0, math.inf
    )
    min_similarity: float = setting(0.5, "lowest cosine of matched descriptors", -1.0, 1.0)
    min_margin: float = setting(
        0.0,
        "by which a match must beat the second best; from or to 0 only by a restart",
        0.0,
        2.0,
    )
    min_correlation: float = setting(
        0.55,
        "lowest correlation of the images in the four quarters around a match; -1 keeps all",
        -1.0,
        1.0,
    )
    max_motion: float = setting(
        64.0,
        "pixels between a point and its expected place, along x or y; 0: no tracks; from or to 0 "
        "only by a restart",
        0.0,
        1e5,
    )
    track_similarity: float = setting(0.7, "lowest cosine of descriptors along a track", -1.0, 1.0)
    track_share: float = setting(
        1.0,
        "share of max_keypoints that tracks take first; the rest goes to new keypoints",
        0.0,
        1.0,
    )
    coordinates: str = setting(
        "rectified", "of the keypoints of raw images that are given out", choices=COORDINATES
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.max_depth > 0:
            raise ValueError(f"max_depth is {self.max_depth}, must be above 0")
        if self.min_depth > self.max_depth:
            raise ValueError(
                f"min_depth is {self.min_depth}, must be at most max_depth, {self.max_depth}"
            )

    def compiled(self) -> tuple:
        """What an engine is built for: a config with other values here needs another engine."""
        fixed = (getattr(self, name) for name in fixed_settings(type(self)))
        return (*fixed, self.min_margin > 0, self.max_motion > 0)
