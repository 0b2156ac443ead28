"""Pseudo-labels: where the detector is taught to fire.

Labels are computed once for a folder of images, in parallel, and kept in one `.npz` file: `paths`
(relative to the folder), `digest` (CRC-32 of each image file, so that labels are not taken for
another image's), `start` (the first keypoint of each image, and the total), and for each keypoint
`xy` (float32, pixels, centre of the top-left pixel at (0, 0)), `response`, `size` and
`repeat`, the share of random views of the image in which the detector finds the keypoint again;
`settings` says in JSON how they were made. Training can leave out what does not survive a change
of view (the idea of SuperPoint's homographic adaptation, applied to SIFT and others).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from rich.progress import Progress

from kp_training.classics import check_detector, classic_keypoints, repeat_share
from kp_training.pairs import find_pairs

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff"}
# Ends of names in the RGB-D Object Dataset of what belongs to a colour image, and that image's.
NOT_COLOUR = {"_depth": "", "_mask": "", "_depthcrop": "_crop", "_maskcrop": "_crop"}
PART = 100  # images after which what is done is kept


@dataclass(frozen=True)
class Labels:
    """Keypoints of all images of a folder; see the module's text for the arrays."""

    folder: Path
    paths: np.ndarray
    digest: np.ndarray
    start: np.ndarray
    xy: np.ndarray
    response: np.ndarray
    size: np.ndarray
    repeat: np.ndarray
    settings: str = ""  # JSON: how they were made

    def __len__(self) -> int:
        return len(self.paths)

    def of_image(self, index: int) -> np.ndarray:
        """(N, 4) float32: x, y, repeat and response of one image's keypoints, strongest first."""
        part = slice(self.start[index], self.start[index + 1])
        columns = [self.xy[part], self.repeat[part], self.response[part]]
        return np.column_stack(columns).astype(np.float32)


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted; depth maps and masks of RGB-D sets are none, and of
    a set of stereo pairs only the images of the pairs.

    Raises:
        ValueError: not a folder, or no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    if pairs := find_pairs(folder):
        return sorted({folder / name for pair in pairs for name in (pair.left, pair.right)})
    images = {p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES}
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
    """An image (H, W) uint8, None if it cannot be read or is larger than OpenCV allows."""
    try:
        return cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    except (cv2.error, UnicodeError):
        return None


def image_seed(folder: Path, path: Path) -> int:
    """Of an image's random views: by name, so that its labels do not depend on those beside it."""
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
    folder: Path, out: Path, most: int = 2000, views: int = 5, detector: str = "sift"
) -> tuple[Labels, list[Path]]:
    """Label every image below a folder and write the result to `out`, atomically.

    What is done is kept in parts beside `out`, so that a call that was interrupted goes on.

    Returns:
        The labels, and the images that could not be read and were left out.

    Raises:
        ValueError: no readable image, or an unknown detector.
    """
    check_detector(detector)
    check_writable(out)
    job = partial(_label_file, folder=folder, most=most, views=views, detector=detector)
    # Spawned, not forked: a fork inherits the locks of OpenCV's and torch's threads.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:

        def rows_of(paths: list[Path]) -> Iterator[np.ndarray | None]:
            return pool.map(job, paths, chunksize=4)

        settings = {"detector": detector, "most": most, "views": views}
        return label_in_parts(folder, out, rows_of, settings)


def label_in_parts(
    folder: Path,
    out: Path,
    rows_of: Callable[[list[Path]], Iterable[np.ndarray | None]],
    settings: dict[str, str | int],
) -> tuple[Labels, list[Path]]:
    """Label the images of a folder part by part, going on where an earlier call was stopped.

    Args:
        rows_of: for each of some images (N, 5), x, y, response, size, repeat; None if it cannot
            be read.
        settings: of the labels; parts that were made with other ones are not used.

    Returns:
        The labels, and the images that could not be read and were left out.

    Raises:
        ValueError: no readable image.
    """
    paths = find_images(folder)
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(exist_ok=True)
    said = json.dumps(settings)
    names = [path.relative_to(folder).as_posix() for path in paths]
    rows: dict[str, np.ndarray | None] = {}
    digests: dict[str, int] = {}
    with Progress() as bar:
        task = bar.add_task("labelling", total=len(paths))
        for begin in range(0, len(paths), PART):
            some = names[begin : begin + PART]
            digests |= {name: _digest(folder / name) for name in some}
            contents = (f"{name} {digests[name]}" for name in some)
            key = hashlib.sha256("\n".join([said, *contents]).encode()).hexdigest()[:16]
            file = parts / f"{key}.npz"
            done = _read_part(file)
            if done is None:
                done = dict.fromkeys(some)
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
    _write_arrays(out, arrays | {"settings": np.array(said)})
    shutil.rmtree(parts)
    unreadable = [folder / name for name, found in rows.items() if found is None]
    return load_labels(folder, out), unreadable


def _digest(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def _pack(rows: dict[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    """The arrays of the images that could be read."""
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


def _read_part(file: Path) -> dict[str, np.ndarray] | None:
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as a:
        columns = [a["xy"], a["response"], a["size"], a["repeat"]]
        table, start = np.column_stack(columns), a["start"]
        return {str(name): table[start[i] : start[i + 1]] for i, name in enumerate(a["paths"])}


def _write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    partial_file = file.with_name(file.name + ".part")
    with partial_file.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    os.replace(partial_file, file)


def check_writable(out: Path) -> None:
    """Find out before the work is done whether its result can be written.

    Raises:
        ValueError: `out` is a folder.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of the file to write")
    out.parent.mkdir(parents=True, exist_ok=True)


def load_labels(folder: Path, file: Path) -> Labels:
    """Read labels of a folder from a file that `label_folder` wrote.

    Raises:
        ValueError: not such a file, or some of its images are not below the folder or are others.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
            labels = Labels(folder=folder, settings=str(found.pop("settings", "")), **found)
            count = int(labels.start[-1])
            shapes = [len(labels.start) - 1, len(labels.digest), *labels.xy.shape]
            shapes += [len(labels.response), len(labels.size), len(labels.repeat)]
            if shapes != [len(labels), len(labels), count, 2, count, count, count]:
                raise ValueError("arrays do not belong together")
    except (TypeError, ValueError, IndexError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is not a file of labels; `kp label` makes one") from error
    missing = [path for path in labels.paths if not (folder / path).is_file()]
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} of its {len(labels)} images are not below {folder}, "
            f"the first {missing[0]}"
        )
    pairs = zip(labels.paths, labels.digest, strict=True)
    others = [path for path, digest in pairs if _digest(folder / path) != digest]
    if others:
        raise ValueError(
            f"{file}: {len(others)} of its {len(labels)} images are not those below {folder}, "
            f"the first {others[0]}; label them again"
        )
    return labels
