"""`kp evaluate homography`: evaluates methods on image pairs with known homographies.

It reads sequences of HPatches (`1.ppm` ... `6.ppm`, `H_1_2` ... `H_1_6`; Balntas et al., 2017) and
of Oxford's affine set (`img1.ppm`, `H1to2p`; Mikolajczyk et al., 2005). Every image of a sequence
is paired with the first one. The metrics are those of DeTone et al. (2018); docs/evaluation.md has
the formulas.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial import cKDTree

from kp_training.evaluation.image_pairs import (
    PairResult,
    load_usable,
    pair_metrics_file,
    pair_protocol,
    run_method,
)
from kp_training.evaluation.method import Found, Method
from kp_training.evaluation.methods import REFERENCE, Engine, make_method
from kp_training.evaluation.metrics import (
    REPEAT_TOLERANCE,
    Value,
    average_precision,
    share,
    squared_distances,
)
from kp_training.evaluation.reasons import listed
from kp_training.evaluation.scenes import read_grey
from kp_training.image_files import folders_below

IMAGE = re.compile(r"(?:img)?(\d+)\.(?:ppm|pgm|png|jpg)")
MATRIX = re.compile(r"H_?1(?:to|_)(\d+)p?")
RANSAC_PX = 3.0  # maximum reprojection error of an inlier
CORNER_TOLERANCES = (1, 3, 5)  # pixels

METRICS = (
    "repeatability",
    "repeatability_1px",
    "matching_score",
    "matching_accuracy",
    "total_matches",
    "correct_matches",
    "descriptor_map",
    *(f"homography_accuracy_{t}px" for t in CORNER_TOLERANCES),
    "inference_ms",
)


@dataclass(frozen=True)
class PairFiles:
    """Two image files, and the file of the 3x3 homography from the first to the second."""

    name: str
    first: Path
    second: Path
    matrix: Path


@dataclass(frozen=True)
class Pair:
    """Two grey images and the homography (3, 3) from the first to the second."""

    name: str
    first: np.ndarray
    second: np.ndarray
    matrix: np.ndarray


@dataclass
class HomographyEvaluation:
    """`metrics` is the content of metrics.json; `shown` and `shown_results` are for the report."""

    metrics: dict
    methods: list[Method]
    shown: Pair
    shown_results: dict[str, PairResult]


def find_pairs(folder: Path) -> tuple[list[PairFiles], list[str]]:
    """Find the pairs of all sequences below a folder; returns also why others were skipped.

    Raises:
        ValueError: `folder` is not a folder, or has no sequence.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    pairs, skipped = [], []
    for place in folders_below(folder):
        files = [p for p in sorted(place.iterdir()) if p.is_file()]
        matrices = {int(m[1]): p for p in files if (m := MATRIX.fullmatch(p.name))}
        images = {int(m[1]): p for p in files if (m := IMAGE.fullmatch(p.name))}
        if not matrices:
            continue
        sequence = folder.resolve().name if place == folder else str(place.relative_to(folder))
        for number in sorted(matrices.keys() | images.keys() - {1}):
            name = f"{sequence}/1-{number}"
            if 1 in images and number in images and number in matrices:
                pair = PairFiles(name, images[1], images[number], matrices[number])
                pairs.append(pair)
            else:
                missing = [f"image {n}" for n in (1, number) if n not in images]
                missing += ["homography"] if number not in matrices else []
                skipped.append(f"{name}: {' and '.join(missing)} missing")
    if not pairs:
        raise ValueError(
            f"{folder} has no sequence (1.ppm, 2.ppm, H_1_2 or img1.ppm, img2.ppm, H1to2p)"
        )
    return pairs, skipped


def load_pair(files: PairFiles, size: tuple[int, int] | None = None) -> Pair:
    """Read a pair.

    Args:
        size: width and height to resize both images to; the homography is adapted.

    Raises:
        ValueError: a file is broken.
    """
    first, second = read_grey(files.first), read_grey(files.second)
    try:
        matrix = np.array(files.matrix.read_text().split(), float).reshape(3, 3)
    except ValueError as error:
        raise ValueError(f"{files.matrix.name} does not hold a 3x3 matrix") from error
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise ValueError(f"{files.matrix.name} is not a homography")
    if size is not None:
        matrix = _scaling(second.shape, size) @ matrix @ np.linalg.inv(_scaling(first.shape, size))
        shrinks = size[0] <= first.shape[1]
        kind = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        first, second = (cv2.resize(image, size, interpolation=kind) for image in (first, second))
    return Pair(files.name, first, second, matrix)


def _scaling(shape: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    """Matrix (3, 3) from pixels of an image to those of the resized image."""
    x, y = size[0] / shape[1], size[1] / shape[0]
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1.0]])


def warp(xy: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a homography to points (N, 2); NaN for points that end up behind the camera."""
    homogeneous = np.column_stack([xy, np.ones(len(xy))]) @ matrix.T
    depth = homogeneous[:, 2:] * np.sign(matrix[2, 2] or 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(depth > 0, homogeneous[:, :2] / homogeneous[:, 2:], np.nan)


def pair_metrics(pair: Pair, first: Found, second: Found, matches: np.ndarray) -> dict[str, Value]:
    """Metrics of one pair, from the keypoints of both images and (M, 2) indices of matches."""
    back = np.linalg.inv(pair.matrix)
    # For each image: true positions of its keypoints in the other image, and which are inside it.
    places = warp(first.xy, pair.matrix), warp(second.xy, back)
    shared = (
        _inside(places[0], pair.second.shape),
        _inside(places[1], pair.first.shape),
    )
    apart = [np.full(len(p), np.inf) for p in places]
    others = second.xy, first.xy
    for a, place, inside, other in zip(apart, places, shared, others, strict=True):
        if inside.any() and len(other):
            a[inside], _ = cKDTree(other).query(place[inside])
    nears = np.concatenate([a[inside] for a, inside in zip(apart, shared, strict=True)])
    rows, columns = matches.T
    off = np.linalg.norm(places[0][rows] - second.xy[columns], axis=1)
    correct = off <= REPEAT_TOLERANCE  # NaN is not correct
    error = corner_error(pair, first.xy[rows], second.xy[columns])
    return {
        "repeatability": share(nears <= REPEAT_TOLERANCE),
        "repeatability_1px": share(nears <= 1),
        "matching_score": float(np.mean([correct.sum() / max(s.sum(), 1) for s in shared])),
        "matching_accuracy": share(correct),
        "total_matches": len(matches),
        "correct_matches": int(correct.sum()),
        **{f"homography_accuracy_{t}px": float(error <= t) for t in CORNER_TOLERANCES},
    }


def pair_map(pair: Pair, first: Found, second: Found) -> float:
    """Nearest-neighbour mAP of the first image's keypoints that lie inside the second image."""
    place = warp(first.xy, pair.matrix)
    inside = _inside(place, pair.second.shape)
    if not inside.any() or not len(second.xy):
        return 0.0
    distance = squared_distances(first.descriptors[inside], second.descriptors)
    nearest = distance.argmin(1)
    correct = np.linalg.norm(second.xy[nearest] - place[inside], axis=1) <= REPEAT_TOLERANCE
    order = np.argsort(distance[np.arange(len(nearest)), nearest], kind="stable")
    apart, _ = cKDTree(second.xy).query(place[inside])
    return average_precision(correct[order], int((apart <= REPEAT_TOLERANCE).sum()))


def _inside(xy: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which points (N, 2) lie inside an image of the given shape; NaN does not."""
    inside: np.ndarray = (xy >= 0) & (xy <= [shape[1] - 1, shape[0] - 1])
    return np.all(inside, axis=1)


def corner_error(pair: Pair, first_xy: np.ndarray, second_xy: np.ndarray) -> float:
    """Mean distance of the first image's corners under the estimated and the true homography.

    The estimate is OpenCV's RANSAC on the matches; the error is infinite if it fails.
    """
    if len(first_xy) < 4:
        return np.inf
    estimate, _ = cv2.findHomography(
        np.float64(first_xy), np.float64(second_xy), cv2.RANSAC, RANSAC_PX, maxIters=5000
    )
    if estimate is None:
        return np.inf
    height, width = pair.first.shape
    corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], float)
    apart = np.linalg.norm(warp(corners, estimate) - warp(corners, pair.matrix), axis=1)
    return float(apart.mean()) if np.isfinite(apart).all() else np.inf


def evaluate_homography(
    folder: Path,
    methods: Sequence[str],
    most: int = 2048,
    size: tuple[int, int] | None = None,
    seeded: bool = False,
    engine: Engine = REFERENCE,
) -> HomographyEvaluation:
    """Evaluate methods on all pairs of a folder.

    Args:
        folder: see `find_pairs`.
        methods: names, see `make_method`.
        most: maximum number of keypoints per image.
        size: width and height to resize all images to; None keeps their size.
        seeded: seed all random generators for each method and pair.
        engine: backend and precision of the networks.

    Raises:
        ValueError: there is no usable pair, or a method is unknown.
    """
    found, skipped = find_pairs(folder)
    subjects = [make_method(name, most, engine) for name in dict.fromkeys(methods)]
    rows: dict[str, dict[str, dict[str, Value]]] = {m.name: {} for m in subjects}
    shown: Pair | None = None
    shown_results: dict[str, PairResult] = {}
    usable = []
    for _, pair in load_usable(found, partial(load_pair, size=size), skipped, "pairs"):
        usable.append(pair.name)
        shown = shown or pair
        for method in subjects:
            result = run_method(method, (pair.first, pair.second), seeded)
            first, second, matches, took = result
            rows[method.name][pair.name] = pair_metrics(pair, first, second, matches) | {
                "descriptor_map": None if method.own_matcher else pair_map(pair, first, second),
                "inference_ms": took,
            }
            if pair is shown:
                shown_results[method.name] = result
    if shown is None:
        raise ValueError(f"no usable pair in {folder}: {listed(skipped)}")
    protocol = pair_protocol(most, size, seeded, skipped, subjects, ransac_px=RANSAC_PX)
    metrics = pair_metrics_file(usable, METRICS, rows, protocol)
    return HomographyEvaluation(metrics, subjects, shown, shown_results)
