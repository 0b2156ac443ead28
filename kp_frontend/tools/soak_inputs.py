"""What `kp soak` sends: a camera, and invalid, unusual or misleading images and camera_infos."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable

import cv2
import numpy as np
import rclpy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from kp_frontend.ros.messages import ImageMessage


class Camera:
    """The driver of a stereo camera, with its own DDS participant.

    Args:
        transport: type of the images, `raw` or `compressed`.
    """

    def __init__(self, transport: str) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node("soak_camera", context=self.context)
        image = ("image", Image) if transport == "raw" else ("image/compressed", CompressedImage)
        topics = {"camera_info": ("camera_info", CameraInfo), "image": image}
        self.publishers = {
            f"{side}/{name}": self.node.create_publisher(kind, f"{side}/{topic}", 10)
            for side in ("left", "right")
            for name, (topic, kind) in topics.items()
        }

    def heard(self) -> bool:
        """Whether all topics have a subscriber."""
        return all(p.get_subscription_count() for p in self.publishers.values())

    def close(self) -> None:
        """Leave DDS."""
        self.node.destroy_node()
        self.context.try_shutdown()  # an interrupt may already have ended it


def _cut(image: ImageMessage) -> None:
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


def _set(field: str, value: str | int | array) -> Callable[[ImageMessage | CameraInfo], None]:
    def spoil(message: ImageMessage | CameraInfo) -> None:
        setattr(message, field, value)

    return spoil


def _stamp(sec: int, nanosec: int) -> Callable[[ImageMessage], None]:
    def spoil(image: ImageMessage) -> None:
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


def compressed(image: Image) -> CompressedImage:
    """A mono8 image as image_transport compresses it."""
    pixels = np.frombuffer(image.data, np.uint8).reshape(image.height, image.step)
    message = CompressedImage(header=image.header, format="mono8; jpeg compressed mono8")
    message.data = array("B", cv2.imencode(".jpg", pixels)[1].tobytes())
    return message


def _reencode(
    suffix: str, form: str, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[CompressedImage], None]:
    """Compress the changed pixels of an image in another format."""

    def spoil(image: CompressedImage) -> None:
        pixels = cv2.imdecode(np.frombuffer(image.data, np.uint8), cv2.IMREAD_GRAYSCALE)
        assert pixels is not None
        image.format = form
        image.data = array("B", cv2.imencode(suffix, change(pixels))[1].tobytes())

    return spoil


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
# The same for CompressedImage.
BAD_COMPRESSED = {
    "truncated data": _cut,
    "no data": _set("data", array("B")),
    "data that is no image": _set("data", array("B", b"nonsense")),
    "depth instead of grey": _set("format", "16UC1; compressedDepth"),
    "a negative stamp": _stamp(-5, 0),
    "an invalid stamp": _stamp(5, 4_000_000_000),
}
GOOD_COMPRESSED = {
    "png": _reencode(".png", "mono8; png compressed mono8", lambda grey: grey),
    "png, 16 bits": _reencode(
        ".png", "mono16; png compressed ", lambda g: g.astype(np.uint16) * 257
    ),
    "jpeg, colour": _reencode(
        ".jpg", "bgr8; jpeg compressed bgr8", lambda g: cv2.cvtColor(g, cv2.COLOR_GRAY2BGR)
    ),
    "no format": _set("format", ""),
}
BY_TRANSPORT = {"raw": (BAD, GOOD), "compressed": (BAD_COMPRESSED, GOOD_COMPRESSED)}
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
