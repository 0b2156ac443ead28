"""Middlebury evaluation: how well a method's keypoints repeat and match, against ground truth.

Definitions (for each scene; N keypoints at most per image; mutual nearest neighbours over
descriptors without epipolar help):

- `matching_accuracy`: share of matches with |y_l - y_r| <= 2 px; `total_matches`.
- `disparity_accuracy`: share of the matches whose left keypoint has ground truth with
  |y_l - y_r| <= 2 px and |x_l - x_r - d_gt| <= 3 px; `correct_matches` their number,
  `disparity_error_px` their median |x_l - x_r - d_gt|.
- `repeatability`, `repeatability_1px`: share of left keypoints, whose true place lies in the right
  image, with a right keypoint within 3 px (1 px) of it.
- `descriptor_map`: area under the precision-recall curve of the nearest-neighbour matches ranked
  by descriptor distance (DeTone et al., 2018); recall counts the left keypoints with a right
  keypoint within 3 px of their true place.
- `inference_ms`: detection and description of one image.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.progress import track
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from kp_frontend.frontend import FrontendConfig, StereoPipeline
from kp_frontend.network import load_network

METRICS = (
    "matching_accuracy",
    "total_matches",
    "disparity_accuracy",
    "correct_matches",
    "disparity_error_px",
    "repeatability",
    "repeatability_1px",
    "descriptor_map",
)
SCENE_KEYS = {"dir", "left", "right", "gt", "scale"}

# A method: grey uint8 image (H, W) -> keypoints (N, 2) float, descriptors (N, D) float32 for which
# a smaller Euclidean distance means a better match.
Method = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Scene:
    """A rectified pair with the left image's true disparity, NaN where unknown, pixels."""

    name: str
    left: np.ndarray
    right: np.ndarray
    disparity: np.ndarray


def read_disparity(path: Path, scale: float) -> np.ndarray:
    """Disparity map in pixels, NaN where unknown, from PFM, PGM or PNG.

    Raises:
        ValueError: the file cannot be read.
    """
    stored = _read_pfm(path) if path.suffix == ".pfm" else cv2.imread(str(path), -1)
    if stored is None:
        raise ValueError(f"{path} cannot be read as a disparity map")
    disparity = stored.astype(np.float32) / scale
    disparity[~np.isfinite(disparity) | (disparity <= 0)] = np.nan
    return disparity


def _read_pfm(path: Path) -> np.ndarray | None:
    """A one-channel PFM as it is stored; OpenCV would divide by the scale in its header."""
    with path.open("rb") as file:
        kind, size, scale = (file.readline().split() for _ in range(3))
        stored = file.read()
    try:
        values = np.frombuffer(stored, "<f4" if float(scale[0]) < 0 else ">f4")
        width, height = map(int, size)
    except (ValueError, IndexError):  # cut, or something else
        return None
    if kind != [b"Pf"] or values.size != width * height:
        return None
    return values.reshape(height, width)[::-1]


def load_scenes(folder: Path) -> tuple[list[Scene], list[str]]:
    """Scenes that `folder/scenes.json` lists, and why the others are left out.

    Raises:
        ValueError: there is no readable scenes.json.
    """
    listing = folder / "scenes.json"
    if not listing.is_file():
        raise ValueError(f"{listing} is missing")
    try:
        entries = json.loads(listing.read_text())
    except ValueError as error:
        raise ValueError(f"{listing} is not JSON: {error}") from error
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and entry.keys() >= SCENE_KEYS for entry in entries
    ):
        raise ValueError(f"{listing} must be a list of scenes with {', '.join(sorted(SCENE_KEYS))}")
    scenes, skipped = [], []
    for entry in entries:
        if entry.get("refright"):
            skipped.append(f"{entry['dir']}: its map belongs to the right image")
            continue
        place = folder / entry["dir"]
        left, right = (
            cv2.imread(str(place / entry[side]), cv2.IMREAD_GRAYSCALE) for side in ("left", "right")
        )
        if left is None or right is None:
            skipped.append(f"{entry['dir']}: an image cannot be read")
            continue
        try:
            disparity = read_disparity(place / entry["gt"], entry["scale"])
        except (ValueError, OSError) as error:
            skipped.append(f"{entry['dir']}: {error}")
            continue
        if not left.shape == right.shape == disparity.shape:
            skipped.append(f"{entry['dir']}: images and disparity map differ in size")
            continue
        scenes.append(Scene(entry["dir"], left, right, disparity))
    return scenes, skipped


NOTHING = (np.zeros((0, 2), np.float32), np.zeros((0, 1), np.float32))  # no keypoints


def network_method(model: str, most: int) -> Method:
    """A network's keypoints as the front end detects them, by released name or weights file."""
    network = load_network(model).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def method(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        config = FrontendConfig(max_keypoints=min(most, image.size // 16))
        found = StereoPipeline(network, config, *image.shape).features(
            torch.from_numpy(image)[None, None].float()
        )
        xy, scores, descriptors = (tensor[0].numpy() for tensor in found)
        return xy[scores > config.score_threshold], descriptors[scores > config.score_threshold]

    return method


def sift_method(most: int) -> Method:
    """OpenCV's SIFT with its default thresholds."""
    sift = cv2.SIFT_create(nfeatures=most)

    def method(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keypoints, descriptors = sift.detectAndCompute(image, None)
        if descriptors is None:
            return NOTHING
        return cv2.KeyPoint.convert(keypoints), descriptors

    return method


def orb_method(most: int) -> Method:
    """OpenCV's ORB; its bits become 0 and 1, of which the squared distance is Hamming's."""
    orb = cv2.ORB_create(nfeatures=most)

    def method(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keypoints, descriptors = orb.detectAndCompute(image, None)
        if descriptors is None:
            return NOTHING
        return cv2.KeyPoint.convert(keypoints), np.unpackbits(descriptors, axis=1).astype(
            np.float32
        )

    return method


CLASSICS: dict[str, Callable[[int], Method]] = {"sift": sift_method, "orb": orb_method}


def _share(right: np.ndarray) -> float:
    """Share of what is right, (N,) bool; 0 of nothing, for nothing was found."""
    return float(right.mean()) if right.size else 0.0


def scene_metrics(scene: Scene, left: tuple, right: tuple) -> dict[str, float | None]:
    """Metrics of one scene from both images' (keypoints, descriptors).

    Shares of nothing are 0; the disparity error of no correct match is None.
    """
    (left_xy, left_descriptors), (right_xy, right_descriptors) = left, right
    if not len(left_xy) or not len(right_xy):
        counts = dict.fromkeys(("total_matches", "correct_matches"), 0)
        return dict.fromkeys(METRICS, 0.0) | counts | {"disparity_error_px": None}
    distance = cdist(left_descriptors, right_descriptors, "sqeuclidean")
    nearest = distance.argmin(1)
    mutual = distance.argmin(0)[nearest] == np.arange(len(left_xy))

    height, width = scene.disparity.shape
    column, row = np.rint(left_xy).astype(int).T
    truth = scene.disparity[row.clip(0, height - 1), column.clip(0, width - 1)]
    known = np.isfinite(truth)
    matched = right_xy[nearest]
    rows_apart = np.abs(left_xy[:, 1] - matched[:, 1])
    error = np.abs(left_xy[:, 0] - matched[:, 0] - truth)
    right_one = known & (rows_apart <= 2) & (error <= 3)

    place = left_xy - np.column_stack([truth, np.zeros(len(truth))])
    visible = known & (place[:, 0] >= 0)
    apart, _ = cKDTree(right_xy).query(place[visible])
    ranked = np.flatnonzero(known)[np.argsort(distance[known, nearest[known]], kind="stable")]
    return {
        "matching_accuracy": _share(rows_apart[mutual] <= 2),
        "total_matches": int(mutual.sum()),
        "disparity_accuracy": _share(right_one[mutual & known]),
        "correct_matches": int((right_one & mutual).sum()),
        "disparity_error_px": (
            float(np.median(error[right_one & mutual])) if (right_one & mutual).any() else None
        ),
        "repeatability": _share(apart <= 3),
        "repeatability_1px": _share(apart <= 1),
        "descriptor_map": average_precision(right_one[ranked], int((apart <= 3).sum())),
    }


def average_precision(correct: np.ndarray, possible: int) -> float:
    """Area under the precision-recall curve of matches in ranked order.

    Args:
        correct: (N,) bool, best match first.
        possible: number of correct matches that there could be.
    """
    if not correct.any():
        return 0.0
    hits = np.cumsum(correct)
    precision = hits / np.arange(1, len(correct) + 1)
    return float(precision[correct].sum() / max(possible, hits[-1]))


def _mean_and_std(values: list[float | None]) -> dict[str, float | None]:
    """Over the scenes that have a value; None if none has."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "std": None}
    return {"mean": float(np.mean(known)), "std": float(np.std(known))}


def evaluate_middlebury(folder: Path, methods: list[str], most: int = 2048) -> dict:
    """Evaluate methods (`sift`, `orb`, a released network or a weights file) on all scenes.

    Returns:
        The contents of metrics.json.

    Raises:
        ValueError: no scenes, or no such method.
    """
    scenes, skipped = load_scenes(folder)
    if not scenes:
        raise ValueError(f"no usable scene in {folder}: {'; '.join(skipped)}")
    results = {}
    for name in methods:
        method = CLASSICS[name](most) if name in CLASSICS else network_method(name, most)
        rows: dict[str, dict[str, float]] = {}
        for scene in track(scenes, f"{name}"):
            found, took = [], []
            for image in (scene.left, scene.right):
                begin = time.perf_counter()
                found.append(method(image))
                took.append(1e3 * (time.perf_counter() - begin))
            rows[scene.name] = {
                **scene_metrics(scene, *found),
                "inference_ms": float(np.mean(took)),
            }
        results[name] = {
            metric: {
                **_mean_and_std([row[metric] for row in rows.values()]),
                "per_scene": {scene: row[metric] for scene, row in rows.items()},
            }
            for metric in next(iter(rows.values()))
        }
    protocol = {"max_keypoints": most, "matching": "mutual nearest neighbours", "skipped": skipped}
    return {"scenes": [s.name for s in scenes], "protocol": protocol, "methods": results}
