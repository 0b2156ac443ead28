"""Keypoints of OpenCV's detectors, and their repeat rate under random views."""

from __future__ import annotations

import cv2
import numpy as np
from scipy.spatial import cKDTree

DETECTORS = ("sift", "orb", "fast")
DISPLACED = 3.0  # pixels; a later detector's keypoint nearer than this is a duplicate


def _opencv_detector(name: str, most: int) -> cv2.Feature2D:
    """A detector with thresholds far below the usual ones (for SIFT, those of Lowe, 2004).

    The network also has to learn weak keypoints, such as those of dim walls. Responses tell
    training which keypoints to prefer.
    """
    if name == "sift":
        return cv2.SIFT_create(contrastThreshold=0.01, enable_precise_upscale=True)
    if name == "orb":
        return cv2.ORB_create(nfeatures=most, fastThreshold=7)
    return cv2.FastFeatureDetector_create(threshold=12)


def check_detector(detector: str) -> None:
    """Raise ValueError unless `detector` is `sift`, `orb`, `fast`, or several joined by `+`."""
    for name in detector.split("+"):
        if name not in DETECTORS:
            raise ValueError(
                f"unknown detector {name!r}; use {', '.join(DETECTORS)}, or several joined by +"
            )


def classic_keypoints(image: np.ndarray, most: int, detector: str = "sift") -> np.ndarray:
    """Keypoints of a grey uint8 image, (N, 4) float32: x, y, response, size, strongest first.

    With several detectors, each one provides an equal share of `most`. A keypoint within 3 px of an
    earlier detector's keypoint is dropped. Responses are divided by the detector's strongest one.
    """
    names = detector.split("+")
    together: np.ndarray = np.zeros((0, 4), np.float32)
    for name in names:
        found = _opencv_detector(name, most).detect(image, None)
        rows: np.ndarray = np.array(
            [(*k.pt, k.response, k.size) for k in found], np.float32
        ).reshape(-1, 4)
        # SIFT repeats a keypoint for each orientation.
        _, first = np.unique(rows[:, :2], axis=0, return_index=True)
        rows = rows[first]
        rows = rows[np.argsort(-rows[:, 2], kind="stable")[: max(most // len(names), 1)]]
        if len(names) > 1 and len(rows):
            rows[:, 2] /= rows[0, 2]
        if len(together) and len(rows):
            apart, _ = cKDTree(together[:, :2]).query(rows[:, :2])
            rows = rows[apart > DISPLACED]
        together = np.concatenate([together, rows])
    return together[np.argsort(-together[:, 2], kind="stable")[:most]]


def random_homography(
    height: int, width: int, move: float, scale: float, rng: np.random.Generator
) -> np.ndarray:
    """Random homography (3, 3) from an image to a view of it.

    Rotation of up to 20 degrees about the centre, `scale`, and a shift of each corner by up to
    `move` times the image size.
    """
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-20, 20), scale)
    moved = corners @ turn[:, :2].T + turn[:, 2]
    moved += rng.uniform(-move, move, (4, 2)) * [width, height]
    return cv2.getPerspectiveTransform(corners, np.float32(moved))


def repeat_share(
    image: np.ndarray, xy: np.ndarray, most: int, views: int, seed: int, detector: str = "sift"
) -> np.ndarray:
    """Repeat rate of points (N, 2): share of random views in which the detector finds them again.

    A view is a random homography (corners shifted by up to 12 % of the size, rotation of up to 20
    degrees) with a random gamma and noise. A point is found again if a keypoint lies within 1.5 px.
    Points outside a view do not count for it.
    """
    rng = np.random.default_rng(seed)
    height, width = image.shape
    seen, found = np.zeros(len(xy)), np.zeros(len(xy))
    for _ in range(views):
        matrix = random_homography(height, width, 0.12, 1.0, rng)
        view = cv2.warpPerspective(image, matrix, (width, height)).astype(np.float32) / 255
        view = view ** np.exp(rng.uniform(-0.5, 0.5)) + rng.normal(0, 0.01, view.shape)
        view = (np.clip(view, 0, 1) * 255).astype(np.uint8)
        places = cv2.perspectiveTransform(xy[None].astype(np.float32), matrix)[0]
        inside = ((places > 4) & (places < [width - 5, height - 5])).all(1)
        seen += inside
        again = classic_keypoints(view, most, detector)[:, :2]
        if len(again):
            distance, _ = cKDTree(again).query(places, distance_upper_bound=1.5)
            found += inside & np.isfinite(distance)
    return (found + 1) / (seen + 2)  # Laplace smoothing: few views give a value near one half
