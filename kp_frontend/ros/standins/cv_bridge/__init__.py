"""What the node uses of ROS 2's `cv_bridge`, with the same interface and behaviour."""

from __future__ import annotations

import sys
from array import array

import cv2
import numpy as np
from sensor_msgs.msg import Image
from std_msgs.msg import Header

# encoding -> (type of a value, channels)
_LAYOUT: dict[str, tuple[str, int]] = {
    "mono8": ("u1", 1),
    "mono16": ("u2", 1),
    "bgr8": ("u1", 3),
    "rgb8": ("u1", 3),
    "bgra8": ("u1", 4),
    "rgba8": ("u1", 4),
    "bayer_rggb8": ("u1", 1),
    "bayer_bggr8": ("u1", 1),
    "bayer_gbrg8": ("u1", 1),
    "bayer_grbg8": ("u1", 1),
    "8UC1": ("u1", 1),
    "8UC3": ("u1", 3),
    "16UC1": ("u2", 1),
    "32FC1": ("f4", 1),
}
# OpenCV names a Bayer pattern by its second row's second and third pixel, ROS by its first two.
_BAYER = {"bayer_rggb8": "BG", "bayer_bggr8": "RG", "bayer_gbrg8": "GR", "bayer_grbg8": "GB"}
_COLOUR = {"mono8": "GRAY", "mono16": "GRAY", "bgr8": "BGR", "rgb8": "RGB", "bgra8": "BGRA",
           "rgba8": "RGBA"}  # fmt: skip


class CvBridgeError(TypeError):
    """An image message cannot be converted."""


class CvBridge:
    """Converts between image messages and numpy arrays."""

    def imgmsg_to_cv2(self, img_msg: Image, desired_encoding: str = "passthrough") -> np.ndarray:
        """The image of a message: (H, W) or (H, W, C); not copied where that is possible.

        Raises:
            CvBridgeError: encodings that are unknown or do not convert, or a message whose size,
                step and data disagree.
        """
        if img_msg.encoding not in _LAYOUT:
            raise CvBridgeError(f"unknown encoding {img_msg.encoding!r}")
        kind, channels = _LAYOUT[img_msg.encoding]
        dtype = np.dtype(kind).newbyteorder(">" if img_msg.is_bigendian else "<")
        row = img_msg.width * channels * dtype.itemsize
        data = np.frombuffer(img_msg.data, np.uint8)
        if row == 0 or img_msg.height == 0:
            raise CvBridgeError(f"an image of {img_msg.width}x{img_msg.height} pixels is empty")
        if img_msg.step < row or len(data) != img_msg.step * img_msg.height:
            raise CvBridgeError(
                f"{img_msg.width}x{img_msg.height} {img_msg.encoding} with step {img_msg.step} "
                f"does not fit {len(data)} bytes"
            )
        rows = data.reshape(img_msg.height, img_msg.step)
        image = (
            rows[:, :row].view(dtype) if img_msg.step == row else rows[:, :row].copy().view(dtype)
        )
        image = image.astype(dtype.newbyteorder("="), copy=False)
        if channels > 1:
            image = image.reshape(img_msg.height, img_msg.width, channels)
        return _convert(image, img_msg.encoding, desired_encoding)

    def cv2_to_imgmsg(
        self, cvim: np.ndarray, encoding: str = "passthrough", header: Header | None = None
    ) -> Image:
        """A message of an image.

        Raises:
            CvBridgeError: an encoding that is unknown or does not fit the array.
        """
        if not isinstance(cvim, np.ndarray) or cvim.ndim not in (2, 3) or cvim.size == 0:
            raise CvBridgeError(f"no image: {type(cvim).__name__} {np.shape(cvim)}")
        channels = 1 if cvim.ndim == 2 else cvim.shape[2]
        if encoding == "passthrough":
            names = {("u1", 1): "8UC1", ("u1", 3): "8UC3", ("u2", 1): "16UC1", ("f4", 1): "32FC1"}
            encoding = names.get((cvim.dtype.str[1:], channels), "")
        if encoding not in _LAYOUT or _LAYOUT[encoding] != (cvim.dtype.str[1:], channels):
            raise CvBridgeError(f"{cvim.dtype} {cvim.shape} is no {encoding or 'known encoding'}")
        message = Image(header=header or Header(), encoding=encoding)
        message.height, message.width = cvim.shape[:2]
        message.is_bigendian = sys.byteorder == "big"
        message.step = message.width * channels * cvim.dtype.itemsize
        message.data = array("B")  # anything else is checked value by value
        native = cvim.astype(cvim.dtype.newbyteorder("="), copy=False)
        message.data.frombytes(np.ascontiguousarray(native).data.cast("B"))
        return message


def _convert(image: np.ndarray, source: str, target: str) -> np.ndarray:
    if target in ("passthrough", source):
        return image
    if target in _LAYOUT and "C" in (source[-2], target[-2]):  # 8UC1 and the like: no conversion
        if _LAYOUT[source] == _LAYOUT[target]:
            return image
        raise CvBridgeError(f"{source} cannot be converted to {target}")
    if target not in _COLOUR:
        raise CvBridgeError(f"{source} cannot be converted to {target!r}")
    if _LAYOUT[source][0] != _LAYOUT[target][0]:  # mono16 from or to 8 bits
        if source == "mono16":
            image = cv2.convertScaleAbs(image.astype(np.float32), alpha=255 / 65535)
        else:
            image = image.astype(np.uint16) * np.uint16(257)
    origin = f"Bayer{_BAYER[source]}" if source in _BAYER else _COLOUR[source]
    if origin == _COLOUR[target]:
        return image
    return cv2.cvtColor(image, getattr(cv2, f"COLOR_{origin}2{_COLOUR[target]}"))
