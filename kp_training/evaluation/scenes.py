"""Rectified stereo pairs with ground truth disparity, from disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

SCENE_KEYS = {"dir", "left", "right", "gt", "scale"}


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
