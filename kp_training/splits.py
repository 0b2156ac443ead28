"""Splits images into training and validation by scene or sequence.

Images of one scene are similar, so a scene is never divided. The side of a scene depends only on
the seed and the name of the scene, and does not change when images are added.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path, PurePosixPath

import numpy as np

from kp_training.labels import Labels
from kp_training.pairs import find_pairs

HELD_OUT = 1 / 20  # share of scenes for validation
FRAMES = 50  # consecutive frames of a recording that form one scene
RGBD = re.compile(r".+_\d+_\d+(_crop)?\.png")  # RGB-D Object Dataset: apple_1_2_34_crop.png
FRAME = re.compile(r"frame_(\d+)\.\w+")  # as `recordings.extract_images` writes them


def scene_of(path: str) -> str:
    """The scene or sequence of an image, from its path in the data set.

    It is an object instance of the RGB-D Object Dataset (its folder), a part of a recording, or,
    for unrelated images, the image itself.
    """
    place = PurePosixPath(path)
    if frame := FRAME.fullmatch(place.name):
        return f"{place.parent}/{int(frame[1]) // FRAMES}"
    if RGBD.fullmatch(place.name):
        return str(place.parent)
    return path


def split_images(labels: Labels, seed: int, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the validation images; writes the split to `file`.

    If the file exists, its split is used, so you can define your own.

    Raises:
        ValueError: the file is invalid or names other images, or there is only one image.
    """
    paths = [Path(path).as_posix() for path in labels.paths]
    if not file.is_file():
        split = _draw(paths, labels.folder, seed)
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps(split, indent=1) + "\n")
        part.replace(file)
    try:
        split = json.loads(file.read_text())
        sides = [set(split["train"]), set(split["validation"])]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a split; it must have lists `train` and `validation`"
        ) from error
    if sides[0] | sides[1] != set(paths) or sides[0] & sides[1] or not all(sides):
        raise ValueError(f"{file} does not split the {len(paths)} labelled images into two parts")
    train, validation = (np.flatnonzero([path in side for path in paths]) for side in sides)
    return train, validation


def _draw(paths: list[str], folder: Path, seed: int) -> dict[str, list[str]]:
    listed = {name: p.scene for p in find_pairs(folder) for name in (p.left, p.right)}
    scene = {path: listed.get(path) or scene_of(path) for path in paths}
    scenes = sorted(set(scene.values()))
    if len(paths) < 2:
        raise ValueError("there is only one image: none can be held out for validation")
    if len(scenes) == 1:  # a short recording: hold out its last tenth
        cut = len(paths) - math.ceil(len(paths) / 10)
        return {"train": paths[:cut], "validation": paths[cut:]}
    lots = {s: hashlib.sha256(f"{seed} {s}".encode()).digest() for s in scenes}
    ranked = sorted(scenes, key=lots.__getitem__)
    limit = int(256 * HELD_OUT)
    held_out = {s for s in scenes if lots[s][0] < limit} or {ranked[0]}
    held_out -= {ranked[-1]}
    return {
        "train": [path for path in paths if scene[path] not in held_out],
        "validation": [path for path in paths if scene[path] in held_out],
    }
