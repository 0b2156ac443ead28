"""User-defined methods, for `--method module:function`.

`function(max_keypoints)` returns a detector: a callable with a grey uint8 image (H, W) as argument.
It returns keypoints (N, 2), x and y in pixels, the centre of the top-left pixel at (0, 0),
strongest first, N at most `max_keypoints`, and descriptors (N, D), for which a smaller Euclidean
distance means a better match. If the detector has a method `match(left_keypoints, left_descriptors,
right_keypoints, right_descriptors)` that returns (M, 2) indices, it replaces the search for mutual
nearest neighbours. docs/evaluation.md has an example.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kp_training.evaluation.method import NOTHING, Found, Method


def external_method(name: str, most: int) -> Method:
    """Create a user-defined method, `module:function`; see the top of this file.

    Modules in the working directory are found too.

    Args:
        most: maximum number of keypoints per image.

    Raises:
        ValueError: the module or function does not exist, or raises an exception.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with _blaming(name):
        made = getattr(importlib.import_module(module), function)(most)

    lengths: set[int] = set()  # descriptor lengths of all images

    def detect(image: np.ndarray) -> Found:
        with _blaming(name):
            xy, descriptors = made(image)
            found = Found(np.asarray(xy, np.float32), np.asarray(descriptors, np.float32))
        if not found.xy.size and not found.descriptors.size:
            return NOTHING
        _check_found(name, found, most, *image.shape)
        lengths.add(found.descriptors.shape[1])
        if len(lengths) > 1:
            raise ValueError(f"method {name} returned descriptors of lengths {sorted(lengths)}")
        return found

    def match(left: Found, right: Found) -> np.ndarray:
        if not len(left.xy) or not len(right.xy):
            return np.zeros((0, 2), int)
        with _blaming(name):
            rows = np.asarray(made.match(*left, *right))
        if rows.size and (
            rows.ndim != 2
            or rows.shape[1] != 2
            or rows.dtype.kind not in "iu"
            or rows.min() < 0
            or (rows.max(0) >= [len(left.xy), len(right.xy)]).any()
        ):
            raise ValueError(f"method {name}: match must return (M, 2) indices of keypoints")
        return rows.reshape(-1, 2).astype(int)

    return Method(name, detect, match if hasattr(made, "match") else None)


def _check_found(name: str, found: Found, most: int, height: int, width: int) -> None:
    """Check what a user's method returned for an image.

    Raises:
        ValueError: wrong shapes, too many keypoints, non-finite values, or keypoints outside.
    """
    if (
        found.xy.ndim != 2
        or found.xy.shape[1] != 2
        or found.descriptors.ndim != 2
        or len(found.xy) != len(found.descriptors)
    ):
        raise ValueError(
            f"method {name} must return keypoints (N, 2) and descriptors (N, D), "
            f"not {found.xy.shape} and {found.descriptors.shape}"
        )
    if len(found.xy) > most:
        raise ValueError(
            f"method {name} returned {len(found.xy)} keypoints, at most {most} allowed"
        )
    if not np.isfinite(found.xy).all() or not np.isfinite(found.descriptors).all():
        raise ValueError(f"method {name} returned non-finite values")
    if (found.xy < -1).any() or (found.xy > [width, height]).any():
        raise ValueError(f"method {name} returned keypoints outside the {width}x{height} image")


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Convert any exception of a user's code into a ValueError that names the method."""
    try:
        yield
    except Exception as error:  # user code can raise anything
        raise ValueError(f"method {name} failed: {error!r}") from error
