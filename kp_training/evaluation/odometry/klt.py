"""Points tracked by optical flow, the yardstick of tracks: KLT."""

from __future__ import annotations

import math

import cv2
import numpy as np

from kp_frontend.calibration import StereoCalibration
from kp_frontend.config import FrontendConfig
from kp_frontend.features import Features, StereoFeatures
from kp_training.evaluation.optical_flow import follow

APART = 8  # pixels between corners
QUALITY = 0.01  # of a corner, as a share of the best one's
LEVELS, STEREO_LEVELS = 3, 4  # of the image pyramids
CLOSURE = 0.5  # pixels; flow there and back must come home


class KltFrontend:
    """Corners (Shi and Tomasi, 1994) tracked from frame to frame, and from the left to the right
    image, by pyramidal Lucas-Kanade (Bouguet, 2001) with a forward-backward check.

    Corners are added where there are none near. There are no descriptors.
    """

    def __init__(self, config: FrontendConfig) -> None:
        self.config = config
        self._before: np.ndarray | None = None
        self._xy: np.ndarray = np.zeros((0, 2), np.float32)
        self._ids: np.ndarray = np.zeros(0, np.uint32)
        self._lengths: np.ndarray = np.zeros(0, np.uint16)
        self._next_id = 1

    def __call__(
        self, left: np.ndarray, right: np.ndarray, calibration: StereoCalibration
    ) -> StereoFeatures:
        """Features of the next rectified pair; scores, sigma and similarity are not known."""
        if self._before is not None and self._before.shape == left.shape:
            place, good = follow(self._before, left, self._xy, LEVELS, CLOSURE)
            self._xy, self._ids = place[good], self._ids[good]
            self._lengths = self._lengths[good] + 1
        else:
            self._xy, self._ids, self._lengths = self._xy[:0], self._ids[:0], self._lengths[:0]
        self._before = left.copy()
        self._add_corners(left)
        place, good = follow(left, right, self._xy, STEREO_LEVELS, CLOSURE)
        disparity = self._xy[:, 0] - place[:, 0]
        c = self.config
        good &= np.abs(self._xy[:, 1] - place[:, 1]) <= c.row_tolerance
        good &= (disparity >= calibration.disparity(c.max_depth) - 1) & (
            disparity <= calibration.disparity(c.min_depth) + 1
        )
        index = np.flatnonzero(good).astype(np.uint32)
        of_right = np.arange(len(index), dtype=np.uint32)
        unknown = np.full(len(index), np.nan, np.float32)
        rows_apart = place[good, 1] - self._xy[good, 1]
        return StereoFeatures(
            width=left.shape[1],
            height=left.shape[0],
            left=_features(self._xy, self._ids, self._lengths),
            right=_features(place[good], self._ids[good], self._lengths[good]),
            left_index=index,
            right_index=of_right,
            disparity=disparity[good],
            disparity_sigma=np.ones(len(index), np.float32),
            similarity=unknown,
            confidence=unknown,
            points=calibration.points(self._xy[good], disparity[good]),
            row_offset=float(np.median(rows_apart)) if len(index) else math.nan,
            calibration=calibration,
        )

    def _add_corners(self, image: np.ndarray) -> None:
        """Fill up with corners away from the points that are tracked."""
        missing = self.config.max_keypoints - len(self._xy)
        if missing <= 0:
            return
        mask = np.full(image.shape, 255, np.uint8)
        for place in np.rint(self._xy).astype(int).tolist():
            cv2.circle(mask, place, APART, 0, -1)
        found = cv2.goodFeaturesToTrack(image, missing, QUALITY, APART, mask=mask)
        if found is None:
            return
        ids = np.arange(self._next_id, self._next_id + len(found), dtype=np.uint32)
        self._next_id += len(found)
        self._xy = np.concatenate([self._xy, found[:, 0]])
        self._ids = np.concatenate([self._ids, ids])
        self._lengths = np.concatenate([self._lengths, np.ones(len(found), np.uint16)])


def _features(xy: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> Features:
    count = len(xy)
    return Features(
        keypoints=xy,
        scores=np.zeros(count, np.float32),
        descriptors=np.zeros((count, 1), np.float32),  # like nothing else
        track_ids=ids,
        track_lengths=lengths,
        sigma=np.full(count, np.nan, np.float32),
    )
