"""Disturbed image pairs: how well features work in bad light, noise, motion and compression.

Each disturbance has a name, such as `noise20`. Its random numbers depend only on the names of the
disturbance and of the scene, so all methods and all runs see the same pixels.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from kp_training.evaluation.method import Found

RIGHT_GAIN, DARK_GAIN, DARK_NOISE = 0.4, 0.15, 2.0
EXAMPLES = "right_dim, dark, noise10, noise20, motion9, motion9_right, jpeg20, rotate20"
# Lowest and highest number in the name of a disturbance.
LIMITS = {"noise": (1, 100), "motion": (2, 99), "jpeg": (1, 100), "rotate": (1, 180)}
Apply = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Disturbance:
    """A change of both images of a pair, or of the right one alone.

    `degrees` is the angle by which the right image is turned around its centre, counterclockwise.
    """

    name: str
    words: str
    apply: Apply
    both: bool = True
    degrees: float = 0.0

    def pair(self, name: str, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The disturbed images of the pair `name`, (H, W) uint8 each. A turned image is larger."""
        rng = np.random.default_rng(zlib.crc32(f"{self.name} {name}".encode()))
        left = self.apply(left, rng) if self.both else left
        return left, self.apply(right, rng)

    def undone(self, right: Found, shape: tuple[int, ...]) -> Found:
        """The keypoints of a turned right image at their places in the image of `shape`, without
        those beyond it."""
        if not self.degrees or not len(right.xy):
            return right
        back = cv2.invertAffineTransform(_turn(shape, self.degrees)[0])
        xy = right.xy @ back[:, :2].T + back[:, 2]
        inside = ((xy >= 0) & (xy <= [shape[1] - 1, shape[0] - 1])).all(1)
        return Found(xy[inside].astype(right.xy.dtype), right.descriptors[inside])


def find_disturbances(names: Sequence[str]) -> list[Disturbance]:
    """Disturbances by name.

    | name | what |
    |---|---|
    | `right_dim` | the right image times 0.4 |
    | `dark` | both images times 0.15, then noise with a standard deviation of 2 |
    | `noiseN` | noise with a standard deviation of N grey levels in both images |
    | `motionN`, `motionN_right` | horizontal motion blur over N pixels, in both images or right |
    | `jpegN` | both images compressed with JPEG quality N |
    | `rotateN` | the right image turned by N degrees around its centre |

    Raises:
        ValueError: a name is unknown or its number is out of range.
    """
    return [_find(name) for name in dict.fromkeys(names)]


def _find(name: str) -> Disturbance:
    if name == "right_dim":
        dim: Apply = lambda image, _: _bytes(image * RIGHT_GAIN)  # noqa: E731
        return Disturbance(name, f"right image x {RIGHT_GAIN:g}", dim, both=False)
    if name == "dark":
        words = f"both images x {DARK_GAIN:g}, noise {DARK_NOISE:g}"
        return Disturbance(
            name, words, lambda image, rng: _noisy(_bytes(image * DARK_GAIN), DARK_NOISE, rng)
        )
    found = re.fullmatch(rf"({'|'.join(LIMITS)})(.*?)(_right)?", name)
    if not found or (found[3] and found[1] != "motion"):
        raise ValueError(f"unknown disturbance {name!r}; examples: {EXAMPLES}")
    kind, right, number = found[1], bool(found[3]), _number(name, found[1], found[2])
    if kind == "noise":
        words = f"both images with noise {number}"
        return Disturbance(name, words, lambda image, rng: _noisy(image, number, rng))
    if kind == "motion":
        words = f"{'right image' if right else 'both images'} blurred over {number} px"
        return Disturbance(name, words, lambda image, _: _blurred(image, number), both=not right)
    if kind == "jpeg":
        words = f"both images with JPEG quality {number}"
        return Disturbance(name, words, lambda image, _: _compressed(image, number))
    words = f"right image turned by {number} degrees"
    return Disturbance(
        name, words, lambda image, _: _turned(image, number), both=False, degrees=number
    )


def _number(name: str, kind: str, text: str) -> int:
    """The number in the name of a disturbance."""
    low, high = LIMITS[kind]
    if not text.isdecimal() or not low <= int(text) <= high:
        raise ValueError(
            f"disturbance {name!r}: {kind} needs a whole number from {low} to {high}, such as "
            f"{kind}20"
        )
    return int(text)


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _noisy(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return _bytes(image + rng.normal(0.0, sigma, image.shape))


def _blurred(image: np.ndarray, length: int) -> np.ndarray:
    kernel = np.full((1, length), 1 / length)
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)


def _compressed(image: np.ndarray, quality: int) -> np.ndarray:
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    restored = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
    assert restored is not None
    return restored


def _turn(shape: tuple[int, ...], degrees: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Matrix (2, 3) from an image to the turned one, and the width and height that hold all."""
    height, width = shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    cosine, sine = np.abs(matrix[0, :2])
    size = round(width * cosine + height * sine), round(width * sine + height * cosine)
    matrix[:, 2] += (np.array(size) - [width, height]) / 2
    return matrix, size


def _turned(image: np.ndarray, degrees: float) -> np.ndarray:
    matrix, size = _turn(image.shape, degrees)
    return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_CUBIC)
