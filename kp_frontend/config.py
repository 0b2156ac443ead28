"""Settings of the front end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kp_frontend.backends import BACKENDS, PRECISIONS
from kp_frontend.settings import check, fixed_settings, setting

COORDINATES = ("rectified", "raw")


@dataclass(frozen=True)
class FrontendConfig:
    """Settings of the front end. Distances are in pixels unless stated otherwise."""

    model: str = setting(
        "tiny", "name of a released network, or path of a .safetensors file", fixed=True
    )
    backend: str = setting(
        "auto",
        "inference backend; auto: the first of them that works",
        choices=("auto", *BACKENDS),
        fixed=True,
    )
    precision: str = setting(
        "auto",
        "numeric precision of the network; the backend must support it",
        choices=PRECISIONS,
        fixed=True,
    )
    device: str = setting("cpu", "device of the torch backend: cpu, cuda or cuda:1", fixed=True)
    engine: str = setting(
        "",
        "file for the tensorrt backend, from `kp export`: a graph (.onnx) or an engine; empty: "
        "the engine is built from the weights",
        fixed=True,
    )
    threads: int = setting(
        0, "number of threads of a CPU backend; 0: one per core", 0, 1024, fixed=True
    )
    max_keypoints: int = setting(
        1024, "maximum number of keypoints per image", 2, 65536, fixed=True
    )
    score_threshold: float = setting(
        0.03, "minimum keypoint score; decrease it for more keypoints in dim scenes", 0.0, 1.0
    )
    nms_radius: int = setting(
        2,
        "radius of non-maximum suppression in pixels; 3 or 4 spreads the keypoints, but fewer of "
        "them repeat",
        2,
        16,
        fixed=True,
    )
    border: int = setting(
        4, "width of the image border without keypoints in pixels", 0, 16384, fixed=True
    )
    row_tolerance: float = setting(
        2.0,
        "maximum row difference of a match in pixels; increase it for poorly calibrated rigs",
        0.0,
        1e5,
    )
    min_depth: float = setting(
        0.1, "minimum depth of a match in metres; used if the cameras are calibrated", 0.0, 1e9
    )
    max_depth: float = setting(
        math.inf,
        "maximum depth of a match in metres, above 0; used if the cameras are calibrated",
        0.0,
        math.inf,
    )
    min_confidence: float = setting(
        0.7,
        "minimum probability of a match to be right; increase it for fewer wrong matches",
        0.0,
        1.0,
    )
    min_similarity: float = setting(
        0.2, "minimum cosine similarity of the descriptors of a match", -1.0, 1.0
    )
    min_margin: float = setting(
        0.0,
        "minimum difference in similarity between the best and the second-best candidate; "
        "switching this on or off (0) requires a restart",
        0.0,
        2.0,
    )
    min_correlation: float = setting(
        -1.0,
        "minimum normalized cross-correlation of the four quadrants of the matched patch; "
        "-1 disables the check",
        -1.0,
        1.0,
    )
    max_motion: float = setting(
        64.0,
        "maximum distance of a tracked point from its predicted position in pixels, along x or y; "
        "0 disables tracking; switching this on or off requires a restart",
        0.0,
        1e5,
    )
    track_similarity: float = setting(
        0.7, "minimum cosine similarity of the descriptors of a track", -1.0, 1.0
    )
    track_share: float = setting(
        1.0,
        "share of max_keypoints that tracked points get first; new keypoints come next",
        0.0,
        1.0,
    )
    coordinates: str = setting(
        "rectified", "coordinates of the published keypoints of raw images", choices=COORDINATES
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
        """Settings that an engine is built for. If one of them changes, a new engine is needed."""
        fixed = (getattr(self, name) for name in fixed_settings(type(self)))
        return (*fixed, self.min_margin > 0, self.max_motion > 0)
