"""Reads rectified stereo pairs with ground truth disparity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from kp_training.evaluation.layouts import SceneFiles, find_scenes
from kp_training.image_files import read_image

CHECK_TOLERANCE = 1.0  # left-right check: maximum difference of the two maps, pixels
SEEN_BY_BOTH = 255  # value of pixels in mask0nocc.png that both images show


@dataclass(frozen=True)
class Scene:
    """A rectified grey pair and its ground truth, in pixels.

    `disparity` (H, W) is for the left image, `right_disparity` (H, W) for the right one if the
    release has it; NaN where unknown. `mask` and `right_mask` (H, W) bool are the pixels visible in
    both images, if the release has them.
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
    """Ground truth of one image: pixel (x, y) corresponds to (x + shift, y) in the other image.

    `shift` (H, W), NaN where unknown; `visible` (H, W) bool: known, and visible in the other image.
    """

    shift: np.ndarray
    visible: np.ndarray


def left_view(scene: Scene) -> View:
    """Ground truth of the left image."""
    other = None if scene.right_disparity is None else scene.right_disparity
    return View(-scene.disparity, _visible(-scene.disparity, other, scene.mask))


def right_view(scene: Scene) -> View | None:
    """Ground truth of the right image; None if the release has no map of it."""
    if scene.right_disparity is None:
        return None
    return View(
        scene.right_disparity,
        _visible(scene.right_disparity, -scene.disparity, scene.right_mask),
    )


def _visible(
    shift: np.ndarray, other_shift: np.ndarray | None, mask: np.ndarray | None
) -> np.ndarray:
    """Pixels that correspond to a visible pixel inside the other image.

    The release's mask decides about occlusion. Without a mask, but with both maps, a pixel is
    occluded if it fails the left-right check (`CHECK_TOLERANCE`).
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
    stored = _read_pfm(path) if path.suffix == ".pfm" else read_image(path, cv2.IMREAD_UNCHANGED)
    if stored is None or stored.ndim != 2:
        raise ValueError(f"{path.name} cannot be read as a disparity map")
    disparity = stored.astype(np.float32) / scale
    disparity[~np.isfinite(disparity) | (disparity <= 0)] = np.nan
    return disparity


def _read_pfm(path: Path) -> np.ndarray | None:
    """Read a one-channel PFM as stored; OpenCV would divide by the scale in its header."""
    with path.open("rb") as file:
        kind, size, scale = (file.readline().split() for _ in range(3))
        stored = file.read()
    try:
        values = np.frombuffer(stored, "<f4" if float(scale[0]) < 0 else ">f4")
        width, height = map(int, size)
    except (ValueError, IndexError):  # truncated or another format
        return None
    if kind != [b"Pf"] or values.size != width * height:
        return None
    return values.reshape(height, width)[::-1]


def read_grey(path: Path) -> np.ndarray:
    """A grey uint8 image (H, W).

    Raises:
        ValueError: the file is missing or is not an image.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    image = read_image(path)
    if image is None:
        raise ValueError(f"{path.name} cannot be read as an image")
    return image


def load_scene(files: SceneFiles, size: tuple[int, int] | None = None) -> Scene:
    """Read a scene.

    Args:
        size: width and height to resize images and maps to, for example (1920, 1080). Rows and
            columns are scaled separately, disparities with the columns. Maps are sampled at the
            nearest pixel, so that no depth is interpolated at edges.

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
                raise ValueError(f"{path.name} has no valid disparity")
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
    # Sample at the centres of the new pixels; cv2.INTER_NEAREST samples at their corners.
    column = ((np.arange(size[0]) + 0.5) * width / size[0]).astype(int)
    row = ((np.arange(size[1]) + 0.5) * height / size[1]).astype(int)
    sampled = array[row[:, None], column]
    return sampled if "mask" in name else sampled * np.float32(size[0] / width)


def load_scenes(folder: Path) -> tuple[list[Scene], list[str]]:
    """Read all scenes of a folder; returns also why others were skipped. See `find_scenes`.

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
