"""Image files of a folder: links are followed, and what OpenCV does not read is counted."""

from __future__ import annotations

import mimetypes
import os
from collections import Counter
from pathlib import Path

import cv2

ALWAYS = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".pnm", ".tif", ".tiff")
# Whether OpenCV has these depends on how it was built; it only tells for writing.
SOMETIMES = (".webp", ".gif", ".avif", ".jp2")
IMAGE_SUFFIXES = frozenset((*ALWAYS, *(s for s in SOMETIMES if cv2.haveImageWriter(f"image{s}"))))
# Images that are not in Python's table of types.
MORE_IMAGES = (".heic", ".heif", ".avif", ".webp", ".jxl", ".exr", ".dng", ".cr2", ".nef", ".arw")


def is_image(path: Path) -> bool:
    """Whether a file's name says that it is an image which OpenCV reads."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def folders_below(folder: Path) -> list[Path]:
    """A folder and all folders below it, those behind links too, each once; sorted."""
    found, seen = [], set()
    for place, names, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            names.clear()  # a link that leads back
            continue
        seen.add(real)
        found.append(Path(place))
    return sorted(found)


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, those behind links too; sorted."""
    return sorted(p for place in folders_below(folder) for p in place.iterdir() if p.is_file())


def other_images(paths: list[Path]) -> list[str]:
    """Which of some files are images that OpenCV does not read, counted by their suffix."""
    others: Counter[str] = Counter()
    for path in paths:
        kind = mimetypes.guess_type(path.name)[0] or ""
        if not is_image(path) and (kind.startswith("image/") or path.suffix.lower() in MORE_IMAGES):
            others[path.suffix.lower()] += 1
    return [
        f"{count} {suffix} files: OpenCV does not read them" for suffix, count in others.items()
    ]
