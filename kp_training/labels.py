"""SIFT pseudo-labels: where the detector is taught to fire.

Labels are computed once for a folder of images, in parallel, and kept in one `.npz` file: `paths`
(relative to the folder), `start` (the first keypoint of each image, and the total), and for each
keypoint `xy` (float32, pixels, centre of the top-left pixel at (0, 0)), `response`, `size` and
`repeat`, the share of random views of the image in which SIFT finds the keypoint again. Training
leaves out what does not survive a change of view (the idea of SuperPoint's homographic adaptation,
applied to SIFT).
"""

from __future__ import annotations

import multiprocessing
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track
from scipy.spatial import cKDTree

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Labels:
    """Keypoints of all images of a folder; see the module's text for the arrays."""

    folder: Path
    paths: np.ndarray
    start: np.ndarray
    xy: np.ndarray
    response: np.ndarray
    size: np.ndarray
    repeat: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def of_image(self, index: int) -> np.ndarray:
        """(N, 3) float32: x, y and repeat of the keypoints of one image, strongest first."""
        part = slice(self.start[index], self.start[index + 1])
        return np.column_stack([self.xy[part], self.repeat[part]]).astype(np.float32)


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted.

    Raises:
        ValueError: not a folder, or no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"no images below {folder} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def sift_keypoints(image: np.ndarray, most: int) -> np.ndarray:
    """SIFT keypoints of a grey uint8 image, (N, 4) float32: x, y, response, size, strongest first.

    The contrast threshold is far below Lowe's (2004): the detector shall also learn the weak
    keypoints of dim walls, and it learns from the order of responses which to prefer.
    """
    sift = cv2.SIFT_create(contrastThreshold=0.01, enable_precise_upscale=True)
    found = [(*k.pt, k.response, k.size) for k in sift.detect(image, None)]
    rows = np.array(found, np.float32).reshape(-1, 4)
    _, first = np.unique(rows[:, :2], axis=0, return_index=True)  # one of each orientation
    rows = rows[first]
    return rows[np.argsort(-rows[:, 2], kind="stable")[:most]]


def random_homography(
    height: int, width: int, move: float, scale: float, rng: np.random.Generator
) -> np.ndarray:
    """A view of an image, (3, 3): rotated by up to 20 degrees about its centre, scaled, and each
    corner moved by up to `move` of the image's size."""
    corners = np.float32([[0, 0], [width, 0], [width, height], [0, height]])
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-20, 20), scale)
    moved = corners @ turn[:, :2].T + turn[:, 2]
    moved += rng.uniform(-move, move, (4, 2)) * [width, height]
    return cv2.getPerspectiveTransform(corners, np.float32(moved))


def repeat_share(image: np.ndarray, xy: np.ndarray, most: int, views: int, seed: int) -> np.ndarray:
    """Share of random views, (N,), in which SIFT has a keypoint within 1.5 px of each point.

    A view is a homography (corners moved by up to 12 % of the size, rotation up to 20 degrees)
    with another gamma and a little noise; points that leave a view are not counted in it.
    """
    rng = np.random.default_rng(seed)
    height, width = image.shape
    seen, found = np.zeros(len(xy)), np.zeros(len(xy))
    for _ in range(views):
        matrix = random_homography(height, width, 0.12, 1.0, rng)
        view = cv2.warpPerspective(image, matrix, (width, height)).astype(np.float32) / 255
        view = view ** np.exp(rng.uniform(-0.5, 0.5)) + rng.normal(0, 0.01, view.shape)
        view = np.uint8(np.clip(view, 0, 1) * 255)
        places = cv2.perspectiveTransform(xy[None].astype(np.float32), matrix)[0]
        inside = ((places > 4) & (places < [width - 5, height - 5])).all(1)
        seen += inside
        again = sift_keypoints(view, most)[:, :2]
        if len(again):
            distance, _ = cKDTree(again).query(places, distance_upper_bound=1.5)
            found += inside & np.isfinite(distance)
    return (found + 1) / (seen + 2)  # with few views, lean towards one half


def _label_file(path: Path, seed: int, most: int, views: int) -> np.ndarray | None:
    cv2.setNumThreads(1)
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if image is None:
        return None
    rows = sift_keypoints(image, most)
    return np.column_stack([rows, repeat_share(image, rows[:, :2], most, views, seed)])


def label_folder(
    folder: Path, out: Path, most: int = 2000, views: int = 5, seed: int = 0
) -> tuple[Labels, list[Path]]:
    """Label every image below a folder and write the result to `out`, atomically.

    Returns:
        The labels, and the images that could not be read and were left out.

    Raises:
        ValueError: no readable image.
    """
    paths = find_images(folder)
    check_writable(out)
    # Spawned, not forked: a fork inherits the locks of OpenCV's and torch's threads.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        results: Iterator[np.ndarray | None] = pool.map(
            partial(_label_file, most=most, views=views),
            paths,
            range(seed, seed + len(paths)),
            chunksize=8,
        )
        rows = list(track(results, "labelling", total=len(paths)))
    return write_labels(folder, out, dict(zip(paths, rows, strict=True)))


def write_labels(
    folder: Path, out: Path, rows: dict[Path, np.ndarray | None]
) -> tuple[Labels, list[Path]]:
    """Write the labels of a folder to `out`, atomically.

    Args:
        rows: for each image (N, 5), x, y, response, size, repeat; None if it cannot be read.

    Returns:
        The labels, and the images that could not be read and were left out.

    Raises:
        ValueError: no readable image.
    """
    good = {path: r for path, r in rows.items() if r is not None}
    if not good:
        raise ValueError(f"none of the {len(rows)} images below {folder} can be read")
    table = np.concatenate(list(good.values()))
    arrays = {
        "paths": np.array([str(path.relative_to(folder)) for path in good]),
        "start": np.cumsum([0, *(len(r) for r in good.values())]),
        "xy": table[:, :2],
        "response": table[:, 2],
        "size": table[:, 3],
        "repeat": table[:, 4],
    }
    arrays = {k: np.float32(v) if v.dtype == np.float64 else v for k, v in arrays.items()}
    partial_file = out.with_name(out.name + ".part")
    with partial_file.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(partial_file, out)
    return Labels(folder=folder, **arrays), [path for path in rows if path not in good]


def check_writable(out: Path) -> None:
    """Find out before the work is done whether its result can be written.

    Raises:
        ValueError: `out` is a folder.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of the file to write")
    out.parent.mkdir(parents=True, exist_ok=True)


def load_labels(folder: Path, file: Path) -> Labels:
    """Read labels of a folder from a file that `write_labels` wrote.

    Raises:
        ValueError: not such a file, or some of its images are not below the folder.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            labels = Labels(folder=folder, **{name: arrays[name] for name in arrays.files})
    except (TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is not a file of labels; `kp label` makes one") from error
    missing = [path for path in labels.paths if not (folder / path).is_file()]
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} of its {len(labels)} images are not below {folder}, "
            f"the first {missing[0]}"
        )
    return labels
