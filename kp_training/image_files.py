"""Finds the image files of a folder. Links are followed; unsupported formats are counted."""

from __future__ import annotations

import mimetypes
import os
from collections import Counter
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

Item = TypeVar("Item")

ALWAYS = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".pnm", ".tif", ".tiff")
# Support for these depends on the build of OpenCV, which reports it only for writing.
SOMETIMES = (".webp", ".gif", ".avif", ".jp2")
IMAGE_SUFFIXES = frozenset((*ALWAYS, *(s for s in SOMETIMES if cv2.haveImageWriter(f"image{s}"))))
# Image formats that are missing in Python's table of types.
MORE_IMAGES = (".heic", ".heif", ".avif", ".webp", ".jxl", ".exr", ".dng", ".cr2", ".nef", ".arw")


def is_image(path: Path) -> bool:
    """Whether the suffix of a file is that of an image that OpenCV can read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def folders_below(folder: Path) -> list[Path]:
    """A folder and all its subfolders, including those behind links, each once, sorted."""
    found, seen = [], set()
    for place, names, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            names.clear()  # a link to a folder that was already visited
            continue
        seen.add(real)
        found.append(Path(place))
    return sorted(found)


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, including those behind links, sorted."""
    return sorted(p for place in folders_below(folder) for p in place.iterdir() if p.is_file())


def other_images(paths: list[Path]) -> list[str]:
    """Lines of text that count the images that OpenCV cannot read, by suffix."""
    others: Counter[str] = Counter()
    for path in paths:
        kind = mimetypes.guess_type(path.name)[0] or ""
        if not is_image(path) and (kind.startswith("image/") or path.suffix.lower() in MORE_IMAGES):
            others[path.suffix.lower()] += 1
    return [
        f"{count} {suffix} files: OpenCV cannot read this format"
        for suffix, count in others.items()
    ]


def read_image(path: Path, flags: int = cv2.IMREAD_GRAYSCALE) -> np.ndarray | None:
    """An image as `cv2.imread` has it; None if it cannot be read or is larger than it allows."""
    try:
        return cv2.imread(str(path), flags)
    except (cv2.error, UnicodeError):
        return None


def evenly(items: list[Item], most: int) -> list[Item]:
    """At most so many of the items, spread evenly over the list."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]
