"""`kp evaluate odometry`: a small, plain stereo odometry that exists to compare front ends.

Every method goes through the same steps: stereo matches with depth, matches of the left keypoints
to those of the next frame, and the motion from 3-D points to pixels by `cv2.solvePnPRansac` with
`cv2.solvePnPRefineLM`. Nothing is optimised beyond that, so the drift tells of the matches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch.nn import functional as F

from kp_frontend.calibration import StereoCalibration
from kp_frontend.config import FrontendConfig
from kp_frontend.features import Features, StereoFeatures
from kp_frontend.frontend import StereoFrontend
from kp_frontend.matching import match_temporal
from kp_training.evaluation.frames import StereoFrame
from kp_training.evaluation.method import Found, Method, match_limited, refined, stereo_limits
from kp_training.evaluation.methods import CLASSICS, make_method

SIMILARITY = 0.5  # cosine that matched descriptors must have, in space and in time
MOTION_SHARE = 0.25  # of the image's width: the farthest that a keypoint may move between frames
REPROJECTION_PX = 2.0  # an inlier's
RANSAC_ROUNDS, RANSAC_CONFIDENCE = 1000, 0.999
FEWEST_INLIERS = 8

# A pair's images and calibration -> its features.
StereoMethod = Callable[[np.ndarray, np.ndarray, StereoCalibration], StereoFeatures]


def stereo_method(name: str, config: FrontendConfig) -> StereoMethod:
    """A method by name, as `make_method` knows it.

    Networks run as `StereoFrontend`; others' keypoints go through the same stereo matching and
    refinement.

    Raises:
        ValueError: no such method, or one that matches in a way of its own.
    """
    if name not in CLASSICS and ":" not in name:
        return StereoFrontend(replace(config, model=name))
    method = make_method(name, config.max_keypoints)
    if method.own_matcher:
        raise ValueError(f"{name} has a matcher of its own, odometry matches by descriptors")
    return OtherFrontend(method, config)


class OtherFrontend:
    """Keypoints of a method that is no network of ours, matched and refined as ours are."""

    def __init__(self, method: Method, config: FrontendConfig) -> None:
        self.method, self.config = method, config

    def __call__(
        self, left: np.ndarray, right: np.ndarray, calibration: StereoCalibration
    ) -> StereoFeatures:
        """Features of a rectified pair; tracks are not made, similarity is not known."""
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


def match_frames(now: StereoFeatures, before: StereoFeatures) -> tuple[np.ndarray, np.ndarray]:
    """Rows of left keypoints that match in time: in `now`, and in `before`."""
    if not len(now.left) or not len(before.left):
        return np.zeros(0, int), np.zeros(0, int)
    limits = torch.tensor([MOTION_SHARE * now.width, SIMILARITY])
    sides = []
    for features in (now.left, before.left):
        xy, descriptors = map(torch.from_numpy, (features.keypoints, features.descriptors))
        sides.append((xy, torch.ones(len(features), dtype=torch.bool), descriptors))
    row = match_temporal(*sides[0], *sides[1], limits).numpy()
    return np.flatnonzero(row >= 0), row[row >= 0]


def motion(before: StereoFeatures, now: StereoFeatures) -> tuple[np.ndarray | None, int]:
    """How the camera moved between two frames.

    Returns:
        Pose (4, 4) of the camera now in the frame of the camera before, or None if it cannot be
        told, and the number of inliers.
    """
    points = np.full((len(before.left), 3), np.nan)
    points[before.left_index] = before.points
    rows, rows_before = match_frames(now, before)
    good = np.isfinite(points[rows_before, 2])
    places = points[rows_before][good]
    pixels = now.left.keypoints[rows][good].astype(np.float64)
    c = now.calibration
    if len(places) < FEWEST_INLIERS or c is None:
        return None, 0
    k = np.array([[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1]])
    cv2.setRNGSeed(0)
    found, turn, shift, inliers = cv2.solvePnPRansac(
        places, pixels, k, None, iterationsCount=RANSAC_ROUNDS, reprojectionError=REPROJECTION_PX,
        confidence=RANSAC_CONFIDENCE, flags=cv2.SOLVEPNP_AP3P,
    )  # fmt: skip
    if not found or inliers is None or len(inliers) < FEWEST_INLIERS:
        return None, 0 if inliers is None else len(inliers)
    inliers = inliers[:, 0]
    turn, shift = cv2.solvePnPRefineLM(places[inliers], pixels[inliers], k, None, turn, shift)
    now_from_before = np.eye(4)
    now_from_before[:3, :3] = cv2.Rodrigues(turn)[0]
    now_from_before[:3, 3] = shift[:, 0]
    return np.linalg.inv(now_from_before), len(inliers)


@dataclass
class Track:
    """A trajectory: poses (N, 4, 4) of the left camera in its first frame, and how it was got."""

    poses: list[np.ndarray] = field(default_factory=list)
    inliers: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)  # frames whose motion could not be told
    matches: list[int] = field(default_factory=list)  # stereo matches of each frame


def track_camera(frames: Iterable[StereoFrame], method: StereoMethod) -> Track:
    """Follow a camera through rectified frames.

    Where the motion cannot be told it is taken to be what it was before, and the frame is named in
    `failed`.

    Raises:
        ValueError: frames without a calibration.
    """
    track, before, last = Track(), None, np.eye(4)
    for i, frame in enumerate(frames):
        calibration = frame.calibration()
        if calibration is None:
            raise ValueError("odometry needs calibrated cameras: there is no camera_info")
        now = method(frame.left, frame.right, calibration)
        track.matches.append(len(now))
        if before is None:
            track.poses.append(np.eye(4))
        else:
            step, inliers = motion(before, now)
            track.inliers.append(inliers)
            if step is None:
                track.failed.append(i)
                step = last
            track.poses.append(track.poses[-1] @ step)
            last = step
        before = now
    return track


def travelled(poses: np.ndarray) -> np.ndarray:
    """Way travelled at each pose (N, 4, 4), (N,) metres."""
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def drift(
    estimate: np.ndarray, truth: np.ndarray, lengths: Iterable[float]
) -> list[tuple[float, float, float]]:
    """Errors of all sub-sequences of some lengths, in KITTI's way (Geiger and others, 2012).

    From every frame to the first one that is at least a length further on by the true trajectory:
    the true motion against the estimated one.

    Args:
        estimate, truth: (N, 4, 4) poses.
        lengths: metres.

    Returns:
        Length, translation error in % of it, rotation error in degrees a metre, for each
        sub-sequence.
    """
    way, errors = travelled(truth), []
    for first in range(len(truth)):
        for length in lengths:
            last = int(np.searchsorted(way, way[first] + length))
            if last == len(truth):
                continue
            moved = np.linalg.inv(truth[first]) @ truth[last]
            guessed = np.linalg.inv(estimate[first]) @ estimate[last]
            off = np.linalg.inv(guessed) @ moved
            angle = np.rad2deg(Rotation.from_matrix(off[:3, :3]).magnitude())
            share = 100 * float(np.linalg.norm(off[:3, 3])) / length
            errors.append((length, share, float(angle) / length))
    return errors


def align(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The rigid motion (4, 4) that brings positions (N, 3) nearest to others (N, 3)."""
    centres = estimate.mean(0), truth.mean(0)
    with warnings.catch_warnings():  # of a straight way, whose turn about itself does not matter
        warnings.simplefilter("ignore", UserWarning)
        turn, _ = Rotation.align_vectors(truth - centres[1], estimate - centres[0])
    result = np.eye(4)
    result[:3, :3] = turn.as_matrix()
    result[:3, 3] = centres[1] - result[:3, :3] @ centres[0]
    return result


def absolute_error(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Absolute trajectory error: RMS distance of positions after alignment, metres.

    As Sturm and others (2012) define it; the alignment is rigid, without scale.

    Args:
        estimate, truth: (N, 4, 4) poses.
    """
    places, true_places = estimate[:, :3, 3], truth[:, :3, 3]
    fit = align(places, true_places)
    off = places @ fit[:3, :3].T + fit[:3, 3] - true_places
    return float(np.sqrt((off**2).sum(1).mean()))


def sub_lengths(way: float) -> tuple[float, ...]:
    """Lengths of sub-sequences in metres: KITTI's 100 to 800, or eight that fit a shorter way."""
    if way >= 800:
        return tuple(range(100, 900, 100))
    step = next((s for s in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if way >= 4 * s), way / 4)
    most = int(min(8, 0.9 * way // step))
    return tuple(step * n for n in range(1, most + 1))
