"""Front ends of `kp evaluate odometry`: networks, SIFT, ORB and external methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from kp_frontend.calibration import StereoCalibration
from kp_frontend.config import FrontendConfig
from kp_frontend.features import Features, StereoFeatures
from kp_frontend.frontend import StereoFrontend
from kp_training.evaluation.method import Found, Method, match_limited, refined, stereo_limits
from kp_training.evaluation.methods import CLASSICS, make_method
from kp_training.evaluation.odometry.klt import KltFrontend

# A pair's images and calibration -> its features.
StereoMethod = Callable[[np.ndarray, np.ndarray, StereoCalibration], StereoFeatures]


def stereo_method(name: str, config: FrontendConfig) -> StereoMethod:
    """A method by name: `klt`, or one that `make_method` knows.

    Networks run as `StereoFrontend`; others' keypoints go through the same stereo matching and
    refinement.

    Raises:
        ValueError: no such method, or one that matches in a way of its own.
    """
    if name == "klt":
        return KltFrontend(config)
    if name not in CLASSICS and ":" not in name:
        return StereoFrontend(replace(config, model=name))
    method = make_method(name, config.max_keypoints)
    if method.own_matcher:
        raise ValueError(f"{name} has a matcher of its own, odometry matches by descriptors")
    return OtherFrontend(method, config)


class OtherFrontend:
    """Keypoints of an external method, matched and refined like those of the front end."""

    def __init__(self, method: Method, config: FrontendConfig) -> None:
        self.method, self.config = method, config

    def __call__(
        self, left: np.ndarray, right: np.ndarray, calibration: StereoCalibration
    ) -> StereoFeatures:
        """Features of a rectified pair, without tracks and similarity."""
        found, found_right = self.method.detect(left), self.method.detect(right)
        features, features_right = _features(found), _features(found_right)
        rows = np.zeros((0, 2), int)
        if len(features) and len(features_right):
            rows = match_limited(found, found_right, self._limits(left.shape[1], calibration))
        xy = features.keypoints, features_right.keypoints
        rows, disparity, sigma = refined((left, right), xy, rows, self.config)
        places, right_places = (side[rows[:, i]] for i, side in enumerate(xy))
        return StereoFeatures(
            width=left.shape[1],
            height=left.shape[0],
            left=features,
            right=features_right,
            left_index=rows[:, 0].astype(np.uint32),
            right_index=rows[:, 1].astype(np.uint32),
            disparity=disparity,
            disparity_sigma=sigma,
            similarity=np.full(len(rows), np.nan, np.float32),
            confidence=np.full(len(rows), np.nan, np.float32),
            points=calibration.points(places, disparity),
            row_offset=(
                float(np.median(right_places[:, 1] - places[:, 1])) if len(rows) else math.nan
            ),
            calibration=calibration,
        )

    def _limits(self, width: int, calibration: StereoCalibration) -> np.ndarray:
        """Those of the front end, with the disparities that the calibration allows."""
        limits = stereo_limits(self.config, width)
        limits[1] = calibration.disparity(self.config.max_depth) - 1
        limits[2] = min(limits[2], calibration.disparity(self.config.min_depth) + 1)
        return limits


def _features(found: Found) -> Features:
    """As the front end gives them, with unit descriptors."""
    descriptors = F.normalize(torch.from_numpy(np.float32(found.descriptors))).numpy()
    nothing = np.zeros(len(found.xy), np.float32)
    return Features(
        keypoints=found.xy.astype(np.float32),
        scores=nothing,
        descriptors=descriptors,
        track_ids=nothing.astype(np.uint32),
        track_lengths=nothing.astype(np.uint16),
        sigma=np.full_like(nothing, np.nan),
    )
