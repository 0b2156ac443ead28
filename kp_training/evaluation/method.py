"""Methods under evaluation: they detect keypoints, which are then matched."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from kp_frontend.config import FrontendConfig
from kp_frontend.matching import match_stereo
from kp_frontend.refinement import refine_disparity
from kp_training.evaluation.metrics import mutual_nearest, squared_distances

# What stereo matches of methods without a confidence must reach: cosine of the descriptors, and
# correlation of the images in the four quarters around the match.
OTHER_SIMILARITY, OTHER_CORRELATION = 0.5, 0.55


class Found(NamedTuple):
    """Keypoints (N, 2) and descriptors (N, D) of an image, strongest first."""

    xy: np.ndarray
    descriptors: np.ndarray

    def strongest(self, count: int) -> Found:
        """The strongest `count` keypoints."""
        return Found(self.xy[:count], self.descriptors[:count])


class Published(NamedTuple):
    """Stereo matches under the front end's limits.

    `left_xy` (M, 2) in the left image; `disparity` (M,), refined on the images, and `sigma` (M,),
    its standard deviation, pixels; `confidence` (M,), NaN of methods that know none.
    """

    left_xy: np.ndarray
    disparity: np.ndarray
    sigma: np.ndarray
    confidence: np.ndarray


NOTHING = Found(np.zeros((0, 2), np.float32), np.zeros((0, 1), np.float32))


class Method:
    """A method under evaluation: a detector and a matcher.

    Args:
        name: name in tables.
        detect: maps a grey uint8 image (H, W) to keypoints and descriptors.
        match: maps the left and right results to (M, 2) indices; None uses mutual nearest
            neighbours.
    """

    def __init__(
        self,
        name: str,
        detect: Callable[[np.ndarray], Found],
        match: Callable[[Found, Found], np.ndarray] | None = None,
    ) -> None:
        self.name = name
        self.detect = detect
        self.own_matcher = match is not None
        self._match = match
        self._warm: set[tuple[int, ...]] = set()

    def detect_timed(self, images: tuple[np.ndarray, np.ndarray]) -> tuple[Found, Found, float]:
        """Results of two images, and milliseconds per image, after a warm-up for each size."""
        for image in images:
            if image.shape not in self._warm:  # the first call may allocate or compile
                self.detect(image)
                self._warm.add(image.shape)
        begin = time.perf_counter()
        first, second = (self.detect(image) for image in images)
        return first, second, 1e3 * (time.perf_counter() - begin) / 2

    def match(self, left: Found, right: Found) -> np.ndarray:
        """Matches without epipolar constraint, (M, 2) indices."""
        if self._match is not None:
            return self._match(left, right)
        return mutual_nearest(squared_distances(left.descriptors, right.descriptors))

    def publish(
        self, images: tuple[np.ndarray, np.ndarray], left: Found, right: Found
    ) -> Published:
        """Stereo matches of the same keypoints, with the front end's steps and limits."""
        if not len(left.xy) or not len(right.xy):
            nothing = NOTHING.xy[:, 0]
            return Published(NOTHING.xy, nothing, nothing, nothing)
        limits = stereo_limits(FrontendConfig(), images[0].shape[1])
        if self.own_matcher:
            rows = self.match(left, right)
            apart = left.xy[rows[:, 0]] - right.xy[rows[:, 1]]
            inside = (limits[1] <= apart[:, 0]) & (apart[:, 0] <= limits[2])
            rows = rows[inside & (np.abs(apart[:, 1]) <= limits[0])]
        else:
            rows = match_limited(left, right, limits)
        rows, disparity, sigma = refined(images, (left.xy, right.xy), rows, FrontendConfig())
        unknown = np.full_like(disparity, np.nan)
        return Published(left.xy[rows[:, 0]].astype(np.float32), disparity, sigma, unknown)


def refined(
    images: tuple[np.ndarray, np.ndarray],
    xy: tuple[np.ndarray, np.ndarray],
    rows: np.ndarray,
    config: FrontendConfig,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Refine matches on the images and drop those that do not correlate.

    Confidence is known of networks only: other methods' matches need `OTHER_CORRELATION`.

    Args:
        images: left and right, (H, W) uint8.
        xy: left (N, 2) and right (L, 2) keypoints.
        rows: (M, 2) indices of the matches.
        config: settings of the front end.

    Returns:
        Indices, disparity and its standard deviation (pixels) of the remaining matches.
    """
    left, right = (torch.from_numpy(side[rows[:, i]]).float() for i, side in enumerate(xy))
    grey_left, grey_right = (torch.from_numpy(image).float() for image in images)
    found = refine_disparity(grey_left, grey_right, left, right)
    alike = (found.correlation >= max(config.min_correlation, OTHER_CORRELATION)).numpy()
    sigma = found.plain_sigma().numpy()
    return rows[alike], found.disparity.numpy()[alike], sigma[alike]


def stereo_limits(config: FrontendConfig, width: int) -> np.ndarray:
    """The limits that `StereoFrontend` uses without calibration, in the form of `match_stereo`.

    Confidence is known of networks only: other methods' matches need `OTHER_SIMILARITY`.
    """
    similarity = max(config.min_similarity, OTHER_SIMILARITY)
    return np.array(
        [config.row_tolerance, -1, width + 1, similarity, config.min_margin], np.float32
    )


def match_limited(left: Found, right: Found, limits: np.ndarray) -> np.ndarray:
    """Match with the front end's matcher, (M, 2) indices. Descriptors are normalised first."""
    count = max(len(left.xy), len(right.xy))
    xy = torch.zeros(2, count, 2)
    descriptors = torch.zeros(2, count, left.descriptors.shape[1])
    valid = torch.zeros(2, count, dtype=torch.bool)
    for i, found in enumerate((left, right)):
        n = len(found.xy)
        xy[i, :n] = torch.from_numpy(np.float32(found.xy))
        descriptors[i, :n] = F.normalize(torch.from_numpy(np.float32(found.descriptors)), dim=-1)
        valid[i, :n] = True
    row, _ = match_stereo(xy, valid, descriptors, torch.from_numpy(limits), with_margin=False)
    matched = np.flatnonzero(row.numpy() >= 0)
    return np.column_stack([matched, row.numpy()[matched]])
