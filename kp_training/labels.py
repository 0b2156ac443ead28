"""Pseudo-labels: the keypoints on which the detector is trained.

Labels are computed once for a folder of images, in parallel, and stored in one `.npz` file with
these arrays:

- `paths`: images, relative to the folder
- `digest`: CRC-32 of each image file, to detect labels of other images
- `start`: index of the first keypoint of each image, and the total number of keypoints
- `xy`, for each keypoint: float32, pixels, centre of the top-left pixel at (0, 0)
- `response`, `size`, `repeat`, for each keypoint: `repeat` is the share of random views of the
  image in which the detector finds the keypoint again
- `settings`: how the labels were made, as JSON

Training can skip keypoints with a low repeat rate. This applies the idea of SuperPoint's
homographic adaptation to SIFT and other detectors.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from rich.progress import Progress

from kp_training.classics import check_detector, classic_keypoints, repeat_share
from kp_training.image_files import IMAGE_SUFFIXES, files_below, is_image, read_image
from kp_training.pairs import find_pairs

# RGB-D Object Dataset: name endings of depth maps and masks, and of their colour images.
NOT_COLOUR = {"_depth": "", "_mask": "", "_depthcrop": "_crop", "_maskcrop": "_crop"}
# What a damaged .npz file makes numpy raise.
BROKEN_NPZ = (
    LookupError, TypeError, ValueError, AttributeError, OSError, EOFError, RuntimeError,
    OverflowError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
PART = 100  # images per intermediate result


@dataclass(frozen=True)
class Labels:
    """Keypoints of all images of a folder; the top of this file describes the arrays."""

    folder: Path
    paths: np.ndarray
    digest: np.ndarray
    start: np.ndarray
    xy: np.ndarray
    response: np.ndarray
    size: np.ndarray
    repeat: np.ndarray
    settings: str = ""  # JSON: how the labels were made

    def __len__(self) -> int:
        return len(self.paths)

    def of_image(self, index: int) -> np.ndarray:
        """Keypoints of an image, (N, 4) float32: x, y, repeat, response, strongest first."""
        part = slice(self.start[index], self.start[index + 1])
        columns = [self.xy[part], self.repeat[part], self.response[part]]
        return np.column_stack(columns).astype(np.float32)


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted.

    Depth maps and masks of RGB-D data sets are skipped. For a set of stereo pairs, only the images
    of the pairs are returned.

    Raises:
        ValueError: `folder` is not a folder, or has no images.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    if pairs := find_pairs(folder):
        return sorted({folder / name for pair in pairs for name in (pair.left, pair.right)})
    images = {p for p in files_below(folder) if is_image(p)}
    of_others = {
        path
        for path in images
        for end, colour in NOT_COLOUR.items()
        if path.stem.endswith(end)
        and path.with_stem(path.stem.removesuffix(end) + colour) in images
    }
    paths = sorted(images - of_others)
    if not paths:
        raise ValueError(f"no images below {folder} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def read_grey(path: Path) -> np.ndarray | None:
    """Read an image as (H, W) uint8; None if it is unreadable or too large for OpenCV."""
    return read_image(path)


def image_seed(folder: Path, path: Path) -> int:
    """Seed of an image's random views. It depends only on the name, not on the other images."""
    return zlib.crc32(path.relative_to(folder).as_posix().encode())


def _label_file(
    path: Path, folder: Path, most: int, views: int, detector: str
) -> np.ndarray | None:
    cv2.setNumThreads(1)
    image = read_grey(path)
    if image is None:
        return None
    seed = image_seed(folder, path)
    try:
        rows = classic_keypoints(image, most, detector)
        if not len(rows):
            return np.zeros((0, 5))
        repeat = repeat_share(image, rows[:, :2], most, views, seed, detector)
    except cv2.error:  # too small for the detector's scales
        return None
    return np.column_stack([rows, repeat])


def label_folder(
    folder: Path,
    out: Path,
    most: int = 2000,
    views: int = 5,
    detector: str = "sift",
    every: int = 1,
) -> tuple[Labels, list[Path]]:
    """Label every image below a folder, or every n-th one, and write the result to `out`.

    The result is written atomically. Intermediate results are stored next to `out`, so that an
    interrupted call resumes.

    Returns:
        The labels, and the paths of unreadable images, which were skipped.

    Raises:
        ValueError: there is no readable image, or the detector is unknown.
    """
    check_detector(detector)
    job = partial(_label_file, folder=folder, most=most, views=views, detector=detector)
    # Spawn, because a fork would inherit the locks of OpenCV's and torch's threads.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:

        def rows_of(paths: list[Path]) -> Iterator[np.ndarray | None]:
            return pool.map(job, paths, chunksize=4)

        settings: dict[str, str | int] = {"detector": detector, "most": most, "views": views}
        return label_in_parts(folder, out, rows_of, settings, every)


def label_in_parts(
    folder: Path,
    out: Path,
    rows_of: Callable[[list[Path]], Iterable[np.ndarray | None]],
    settings: Mapping[str, str | int],
    every: int = 1,
) -> tuple[Labels, list[Path]]:
    """Label the images of a folder in parts; resumes where an earlier call was interrupted.

    Args:
        rows_of: returns (N, 5) for each of the given images: x, y, response, size, repeat. None if
            an image is unreadable.
        settings: of the labels. Parts that were made with other settings are not reused.
        every: label every n-th image.

    Returns:
        The labels, and the paths of unreadable images, which were skipped.

    Raises:
        ValueError: there is no readable image.
    """
    paths = find_images(folder)[::every]
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(exist_ok=True)
    settings_json = json.dumps(settings)
    names = [path.relative_to(folder).as_posix() for path in paths]
    rows: dict[str, np.ndarray | None] = {}
    digests: dict[str, int] = {}
    with Progress() as bar:
        task = bar.add_task("labelling", total=len(paths))
        for begin in range(0, len(paths), PART):
            some = names[begin : begin + PART]
            digests |= {name: _digest(folder / name) for name in some}
            contents = (f"{name} {digests[name]}" for name in some)
            key = hashlib.sha256("\n".join([settings_json, *contents]).encode()).hexdigest()[:16]
            file = parts / f"{key}.npz"
            done = _read_part(file)
            if done is None:
                done = {}
                for name, found in zip(some, rows_of(paths[begin : begin + PART]), strict=True):
                    done[name] = found
                    bar.advance(task)
                _write_arrays(file, _pack(done))
            else:
                bar.advance(task, len(some))
            rows |= {name: done.get(name) for name in some}
    arrays = _pack(rows)
    arrays["digest"] = np.array([digests[name] for name in arrays["paths"]], np.uint32)
    if not len(arrays["paths"]):
        raise ValueError(f"none of the {len(paths)} images below {folder} can be read")
    _write_arrays(out, arrays | {"settings": np.array(settings_json)})
    shutil.rmtree(parts)
    unreadable = [folder / name for name, found in rows.items() if found is None]
    return load_labels(folder, out), unreadable


def _digest(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def _pack(rows: dict[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    """The arrays of the readable images."""
    good = {name: found for name, found in rows.items() if found is not None}
    table = np.concatenate([np.zeros((0, 5)), *good.values()]).astype(np.float32)
    return {
        "paths": np.array(list(good), np.str_),
        "start": np.cumsum([0, *(len(found) for found in good.values())]),
        "xy": table[:, :2],
        "response": table[:, 2],
        "size": table[:, 3],
        "repeat": table[:, 4],
    }


def _read_part(file: Path) -> dict[str, np.ndarray | None] | None:
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as a:
            columns = [a["xy"], a["response"], a["size"], a["repeat"]]
            table, start = np.column_stack(columns), a["start"]
            return {str(name): table[start[i] : start[i + 1]] for i, name in enumerate(a["paths"])}
    except BROKEN_NPZ:  # these images are labelled again
        return None


def _write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    partial_file = file.with_name(file.name + ".part")
    with partial_file.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    os.replace(partial_file, file)


def load_labels(folder: Path, file: Path) -> Labels:
    """Read the labels of a folder from a file that `label_folder` wrote.

    Raises:
        ValueError: the file is not a label file, or its images are missing or different.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist; create it with `kp label`")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
            labels = Labels(folder=folder, settings=str(found.pop("settings", "")), **found)
            count = int(labels.start[-1])
            shapes = [len(labels.start) - 1, len(labels.digest), *labels.xy.shape]
            shapes += [len(labels.response), len(labels.size), len(labels.repeat)]
            if shapes != [len(labels), len(labels), count, 2, count, count, count]:
                raise ValueError("arrays have inconsistent lengths")
    except BROKEN_NPZ as error:
        raise ValueError(f"{file} is not a label file; create one with `kp label`") from error
    missing = [path for path in labels.paths if not (folder / path).is_file()]
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} of its {len(labels)} images are missing below {folder}, "
            f"first: {missing[0]}"
        )
    pairs = zip(labels.paths, labels.digest, strict=True)
    others = [path for path, digest in pairs if _digest(folder / path) != digest]
    if others:
        raise ValueError(
            f"{file}: {len(others)} of its {len(labels)} images differ from those below {folder}, "
            f"first: {others[0]}; run `kp label` again"
        )
    return labels
