"""Images and camera_infos that `kp soak` sends: invalid, unusual or misleading ones."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable

import numpy as np
from sensor_msgs.msg import CameraInfo, Image

Spoil = Callable[[Image | CameraInfo], None]


def _cut(image: Image) -> None:
    image.data = image.data[: len(image.data) // 3]


def _empty(image: Image) -> None:
    image.width = image.height = image.step = 0
    image.data = array("B")


def _absurd(image: Image) -> None:
    image.width, image.height, image.step = 2**31, 2**31, 2**31


def _recode(encoding: str, channels: int) -> Callable[[Image], None]:
    """Change the encoding of an image, with `channels` bytes per pixel."""

    def spoil(image: Image) -> None:
        pixels = np.frombuffer(image.data, np.uint8)
        image.encoding, image.step = encoding, image.width * channels
        image.data = array("B", np.repeat(pixels, channels).tobytes())

    return spoil


def _set(field: str, value: str | int) -> Callable[[Image], None]:
    def spoil(image: Image) -> None:
        setattr(image, field, value)

    return spoil


def _stamp(sec: int, nanosec: int) -> Callable[[Image], None]:
    def spoil(image: Image) -> None:
        image.header.stamp.sec, image.header.stamp.nanosec = sec, nanosec

    return spoil


def _big_endian(image: Image) -> None:
    pixels = np.frombuffer(image.data, np.uint8).astype(np.uint16) * 257
    image.encoding, image.step, image.is_bigendian = "mono16", 2 * image.width, 1
    image.data = array("B", pixels.astype(">u2").tobytes())


def _planar(image: Image) -> None:
    image.encoding = "nv12"
    image.data = array("B", image.data.tobytes() + bytes(image.step * image.height // 2))


def _padded(image: Image) -> None:
    pixels = np.frombuffer(image.data, np.uint8).reshape(image.height, image.step)
    image.step += 13
    image.data = array("B", np.pad(pixels, ((0, 0), (0, 13))).tobytes())


def _scale_baseline(info: CameraInfo, scale: float) -> None:
    info.p[3] *= scale


def _not_calibrated(info: CameraInfo) -> None:
    info.k, info.r, info.p = [0.0] * 9, [0.0] * 9, [0.0] * 12


# Invalid images: each must be counted as bad.
BAD = {
    "an unknown encoding": _set("encoding", "nonsense"),
    "no encoding": _set("encoding", ""),
    "depth instead of grey": _recode("16UC1", 2),
    "truncated data": _cut,
    "no pixels": _empty,
    "an absurd size": _absurd,
    "a step that is too small": _set("step", 8),
    "a height that does not fit": _set("height", 10_000),
    "a negative stamp": _stamp(-5, 0),
    "an invalid stamp": _stamp(5, 4_000_000_000),
}
# Valid images in other encodings than mono8: each must be processed.
GOOD = {
    "bgr8": _recode("bgr8", 3),
    "rgba8": _recode("rgba8", 4),
    "bgr16": _recode("bgr16", 6),
    "mono16": _recode("mono16", 2),
    "mono16, big-endian": _big_endian,
    "bayer_rggb8": _recode("bayer_rggb8", 1),
    "bayer_grbg16": _recode("bayer_grbg16", 2),
    "8UC1": _recode("8UC1", 1),
    "yuyv": _recode("yuyv", 2),
    "uyvy": _recode("uyvy", 2),
    "nv12": _planar,
    "padded rows": _padded,
}
# camera_infos that give no depth, or a wrong one: pairs must be processed all the same.
INFOS = {
    "millimetres": lambda info: _scale_baseline(info, 1000.0),
    "no baseline": lambda info: _scale_baseline(info, 0.0),
    "a negative baseline": lambda info: _scale_baseline(info, -1.0),
    "another size": _set("width", 10_000),
    "not calibrated": _not_calibrated,
    "not a number": lambda info: _scale_baseline(info, math.nan),
}


def dark(image: Image) -> None:
    """Replace an image by that of a covered lens."""
    noise = np.random.default_rng(0).integers(0, 6, len(image.data), np.uint8)
    image.data = array("B", noise.tobytes())
