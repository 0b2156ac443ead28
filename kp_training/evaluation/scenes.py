"""Rectified stereo pairs with ground truth disparity, from disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from kp_training.evaluation.layouts import SceneFiles, find_scenes

CHECK_TOLERANCE = 1.0  # the two maps of a point seen by both images differ by no more, pixels
SEEN_BY_BOTH = 255  # in mask0nocc.png


@dataclass(frozen=True)
class Scene:
    """A rectified grey pair and what is known of it, pixels.

    `disparity` (H, W) of the left image, `right_disparity` (H, W) of the right one where the
    release has it; NaN where unknown. `mask` and `right_mask` (H, W) bool: pixels that both images
    see, where the release says it.
    """

    name: str
    left: np.ndarray
    right: np.ndarray
    disparity: np.ndarray
    right_disparity: np.ndarray | None = None
    mask: np.ndarray | None = None
    right_mask: np.ndarray | None = None
    release: str = ""


@dataclass(frozen=True)
class View:
    """One image's ground truth: pixel (x, y) shows what the other image shows at (x + shift, y).

    `shift` (H, W), NaN where unknown; `visible` (H, W) bool: known, and seen by the other image.
    """

    shift: np.ndarray
    visible: np.ndarray


def left_view(scene: Scene) -> View:
    """The left image's ground truth."""
    other = None if scene.right_disparity is None else scene.right_disparity
    return View(-scene.disparity, _visible(-scene.disparity, other, scene.mask))


def right_view(scene: Scene) -> View | None:
    """The right image's ground truth, None where the release has no map of it."""
    if scene.right_disparity is None:
        return None
    return View(
        scene.right_disparity,
        _visible(scene.right_disparity, -scene.disparity, scene.right_mask),
    )


def _visible(
    shift: np.ndarray, other_shift: np.ndarray | None, mask: np.ndarray | None
) -> np.ndarray:
    """Pixels whose place lies in the other image and is not hidden there.

    Hidden: by the release's mask; where there is none but both maps are, a pixel of which the other
    image's map does not lead back to within `CHECK_TOLERANCE` (left-right check).
    """
    height, width = shift.shape
    x = np.arange(width) + shift
    visible = np.isfinite(shift) & (x >= 0) & (x <= width - 1)
    if mask is not None:
        return visible & mask
    if other_shift is None:
        return visible
    column = np.rint(np.where(visible, x, 0)).astype(int)
    back = other_shift[np.arange(height)[:, None], column]
    with np.errstate(invalid="ignore"):
        return visible & (np.abs(back + shift) <= CHECK_TOLERANCE)


def read_disparity(path: Path, scale: float) -> np.ndarray:
    """Disparity map in pixels, NaN where unknown, from PFM, PGM or PNG.

    Raises:
        ValueError: the file cannot be read.
    """
    stored = _read_pfm(path) if path.suffix == ".pfm" else cv2.imread(str(path), -1)
    if stored is None or stored.ndim != 2:
        raise ValueError(f"{path.name} cannot be read as a disparity map")
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


def read_grey(path: Path) -> np.ndarray:
    """A grey uint8 image (H, W).

    Raises:
        ValueError: the file is missing or no image.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise ValueError(f"{path.name} cannot be read as an image")
    return image


def load_scene(files: SceneFiles, size: tuple[int, int] | None = None) -> Scene:
    """Read a scene.

    Args:
        size: width and height to bring images and maps to, for instance (1920, 1080); the images'
            rows and columns are then stretched apart from each other, and disparities with the
            columns. Maps are sampled at the nearest pixel, so that no depth is made up at edges.

    Raises:
        ValueError: a file is missing or broken, or images and maps differ in size.
    """
    left, right = read_grey(files.left), read_grey(files.right)
    arrays = {"left": left, "right": right}
    for name, path in (("disparity", files.truth), ("right_disparity", files.other_truth)):
        if path is not None:
            if not path.is_file():
                raise ValueError(f"{path.name} is missing")
            arrays[name] = read_disparity(path, files.scale)
            if not np.isfinite(arrays[name]).any():
                raise ValueError(f"{path.name} knows no disparity at all")
    for name, path in (("mask", files.mask), ("right_mask", files.other_mask)):
        if path is not None:
            arrays[name] = read_grey(path) == SEEN_BY_BOTH
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        words = ", ".join(f"{name} {w}x{h}" for name, (h, w) in shapes.items())
        raise ValueError(f"images and maps differ in size: {words}")
    if size is not None:
        arrays = {name: _resized(name, array, size) for name, array in arrays.items()}
    return Scene(files.name, release=files.release, **arrays)


def _resized(name: str, array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = array.shape
    if name in ("left", "right"):
        shrinks = size[0] <= width and size[1] <= height
        return cv2.resize(array, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    # The centres of the new pixels in the old ones: cv2's INTER_NEAREST takes their corners.
    column = ((np.arange(size[0]) + 0.5) * width / size[0]).astype(int)
    row = ((np.arange(size[1]) + 0.5) * height / size[1]).astype(int)
    sampled = array[row[:, None], column]
    return sampled if "mask" in name else sampled * np.float32(size[0] / width)


def load_scenes(folder: Path) -> tuple[list[Scene], list[str]]:
    """All scenes of a folder, and why others are left out; see `find_scenes`.

    Raises:
        ValueError: see `find_scenes`.
    """
    found, skipped = find_scenes(folder)
    scenes = []
    for files in found:
        try:
            scenes.append(load_scene(files))
        except ValueError as error:
            skipped.append(f"{files.name}: {error}")
    return scenes, skipped
