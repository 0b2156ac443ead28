"""Converts ROS images to grey images. The node, the bag reader and the training use it.

An image is any object with the fields of sensor_msgs/Image (`data`, `encoding`, `width`, `height`,
`step`, `is_bigendian`) or of sensor_msgs/CompressedImage (`data`, `format`). ROS is not imported.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

BIT_DEPTHS = (8, 10, 12, 14, 16)  # common bit depths of sensors
BIT_DEPTH_CHOICES = ("auto", *map(str, BIT_DEPTHS))


@dataclass(frozen=True)
class Layout:
    """Memory layout of an encoding.

    `bits` per value, `channels` per pixel; `code`, OpenCV's conversion to grey; `luma`, the channel
    that contains the grey value; `planes`, the size of the whole image relative to its first plane,
    which contains the grey values.
    """

    bits: int
    channels: int
    code: int | None = None
    luma: int = 0
    planes: float = 1.0


_COLOURS = {"bgr": (3, cv2.COLOR_BGR2GRAY), "rgb": (3, cv2.COLOR_RGB2GRAY),
            "bgra": (4, cv2.COLOR_BGRA2GRAY), "rgba": (4, cv2.COLOR_RGBA2GRAY)}  # fmt: skip
# ROS names a Bayer pattern after the first two pixels of the first two rows, OpenCV after the
# second and third pixel of the second row.
_BAYER = {"rggb": cv2.COLOR_BayerBG2GRAY, "bggr": cv2.COLOR_BayerRG2GRAY,
          "gbrg": cv2.COLOR_BayerGR2GRAY, "grbg": cv2.COLOR_BayerGB2GRAY}  # fmt: skip
_BITS = (8, 16)
# Names in lower case.
LAYOUTS: dict[str, Layout] = {
    **{f"mono{bits}": Layout(bits, 1) for bits in _BITS},
    **{f"{bits}uc1": Layout(bits, 1) for bits in _BITS},
    **{f"{name}{bits}": Layout(bits, *how) for name, how in _COLOURS.items() for bits in _BITS},
    **{f"{bits}uc3": Layout(bits, *_COLOURS["bgr"]) for bits in _BITS},  # as OpenCV orders them
    **{f"{bits}uc4": Layout(bits, *_COLOURS["bgra"]) for bits in _BITS},
    **{f"bayer_{name}{bits}": Layout(bits, 1, code)
       for name, code in _BAYER.items() for bits in _BITS},
    **{name: Layout(8, 2, luma=1) for name in ("yuv422", "uyvy")},
    **{name: Layout(8, 2, luma=0) for name in ("yuv422_yuy2", "yuyv", "yuy2")},
    **{name: Layout(8, 1, planes=1.5) for name in ("nv12", "nv21")},
    "nv24": Layout(8, 1, planes=3.0),
}  # fmt: skip
DEPTH = "16uc1"  # usually a depth image: read as a grey image only if a bit depth is given


@dataclass(frozen=True)
class _Pixels:
    """Pixel values (H, W) or (H, W, C), uint8 or native uint16, and the conversion to grey."""

    values: np.ndarray
    code: int | None

    def grey(self, bit_depth: int) -> np.ndarray:
        """Grey image (H, W) uint8. 16-bit values are scaled so that 2^bit_depth - 1 becomes 255."""
        values = self.values
        if self.code is not None:
            values = cv2.cvtColor(values, self.code)
        if values.dtype == np.uint8:
            return values
        return cv2.convertScaleAbs(values, alpha=255 / (2**bit_depth - 1))


def to_grey(
    data: bytes | bytearray | array | np.ndarray,
    encoding: str,
    width: int,
    height: int,
    step: int,
    is_bigendian: bool = False,
    bit_depth: int = 16,
) -> np.ndarray:
    """Convert pixels in one of the encodings of sensor_msgs/image_encodings to a grey image.

    Args:
        data: bytes, `step` per row.
        encoding: name of the encoding; case does not matter.
        bit_depth: significant bits of 16-bit values. The largest value of this depth, and larger
            ones, become 255.

    Returns:
        (height, width) uint8; a view of `data` if the image is already grey.

    Raises:
        ValueError: an unsupported encoding, or inconsistent sizes.
    """
    return _unpack(data, encoding, width, height, step, is_bigendian).grey(bit_depth)


class GreyConverter:
    """Converts image messages to grey images and determines the bit depth of 16-bit images.

    With `auto` the bit depth is the smallest of `BIT_DEPTHS` that holds the largest value so far.
    It never decreases.

    Args:
        bit_depth: one of `BIT_DEPTH_CHOICES`. A number also enables 16UC1 images.
        say: called with a message when `auto` changes the bit depth.

    Raises:
        ValueError: `bit_depth` is invalid.
    """

    def __init__(self, bit_depth: str = "auto", say: Callable[[str], None] | None = None) -> None:
        if bit_depth not in BIT_DEPTH_CHOICES:
            raise ValueError(
                f"bit_depth is {bit_depth!r}, must be one of {', '.join(BIT_DEPTH_CHOICES)}"
            )
        self._given = None if bit_depth == "auto" else int(bit_depth)
        self._say = say or (lambda _: None)
        self.bit_depth = self._given  # None before the first 16-bit image
        self.greatest = 0  # value seen in 16-bit images

    def __call__(self, message: Any) -> np.ndarray:
        """The grey image (H, W) uint8 of a message; a view of its data if it is already grey.

        Raises:
            ValueError: it cannot be decoded; the message is one line.
        """
        return self.images([message])[0]

    def images(self, messages: Sequence[Any], names: Sequence[str] = ()) -> list[np.ndarray]:
        """The grey images of messages that belong together, with the same bit depth.

        Args:
            names: names of the images for error messages.

        Raises:
            ValueError: one cannot be decoded; the message is one line.
        """
        pixels = []
        for i, message in enumerate(messages):
            try:
                pixels.append(self._pixels(message))
            except ValueError as error:
                raise ValueError(f"the {names[i]} image: {error}" if names else error) from error
        for p in pixels:
            self._see(p.values)
        return [p.grey(self.bit_depth or 16) for p in pixels]

    def _pixels(self, message: Any) -> _Pixels:
        if hasattr(message, "format"):
            encoding, pixels = message.format.partition(";")[0], _decode(message)
        else:
            encoding, pixels = message.encoding, None
        if encoding.lower() == DEPTH and self._given is None:
            raise ValueError(
                f"{encoding} is usually depth, not an image; to use it, set bit_depth to a number"
            )
        if pixels is None:
            m = message
            size = (m.width, m.height, m.step)
            pixels = _unpack(m.data, m.encoding, *size, bool(m.is_bigendian))
        return pixels

    def clipped(self) -> str:
        """A message if values exceed the given bit depth, else an empty string."""
        if self._given is None or self.greatest < 2**self._given:
            return ""
        return (
            f"16-bit images have values up to {self.greatest}, bit_depth {self._given} makes all "
            f"above {2**self._given - 1} white: set it to a greater one, or to auto"
        )

    def unused_bits(self) -> str:
        """A message if the values so far need far fewer bits than given, else an empty string."""
        if self._given is None or not 0 < self.greatest < 2 ** (self._given - 2):
            return ""
        return (
            f"16-bit images have values up to {self.greatest} only, of {2**self._given - 1}: "
            "set bit_depth to fewer bits, or to auto"
        )

    def _see(self, values: np.ndarray) -> None:
        if values.dtype != np.uint16 or self.greatest >= 2 ** BIT_DEPTHS[-2]:
            return
        self.greatest = max(self.greatest, int(values.max()))
        if self._given is not None:
            return
        found = next(bits for bits in BIT_DEPTHS if self.greatest < 2**bits)
        if found != self.bit_depth:
            self.bit_depth = found
            self._say(
                f"16-bit images have values up to {self.greatest}: read as {found} bits "
                "(bit_depth is auto)"
            )


def _unpack(
    data: bytes | bytearray | array | np.ndarray,
    encoding: str,
    width: int,
    height: int,
    step: int,
    is_bigendian: bool,
) -> _Pixels:
    layout = LAYOUTS.get(encoding.lower())
    if layout is None:
        raise ValueError(f"the encoding {encoding!r} is not one of a grey or colour image")
    if width == 0 or height == 0:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    found = np.frombuffer(data, np.uint8)
    row = width * layout.channels * layout.bits // 8
    if layout.planes > 1:
        step = _luma_step(layout, len(found), row, height, step)
        found = found[: step * height]
    if step < row or len(found) != step * height:
        raise ValueError(
            f"{width}x{height} {encoding} has rows of {row} bytes; a step of {step} and "
            f"{len(found)} bytes do not fit it"
        )
    values = found.reshape(height, step)[:, :row]
    if layout.bits == 16:
        values = np.ascontiguousarray(values).view(">u2" if is_bigendian else "<u2")
        values = values.astype(np.uint16, copy=False)
    if layout.channels > 1:
        values = values.reshape(height, width, layout.channels)
    if layout.channels == 2:
        return _Pixels(cv2.extractChannel(values, layout.luma), None)
    return _Pixels(values, layout.code)


def _luma_step(layout: Layout, size: int, row: int, height: int, step: int) -> int:
    """Bytes per row of the first plane. `step` is this, or the share of a row in all planes."""
    whole = round(size / (height * layout.planes))
    if whole >= row and round(whole * height * layout.planes) == size:
        return whole
    return step


def _decode(message: Any) -> _Pixels:
    """The pixels of a CompressedImage: grey, 8 or 16 bits.

    Raises:
        ValueError: its data is no image, or a part of one.
    """
    name = f"a compressed image ({message.format[:60]})"
    if "compressedDepth" in message.format:
        raise ValueError(f"{name} is depth, not an image")
    data = np.frombuffer(message.data, np.uint8)
    if data[:2].tobytes() == b"\xff\xd8" and b"\xff\xd9" not in data.tobytes():
        raise ValueError(f"{name} is cut short")
    # Unchanged: without the EXIF orientation, and not reduced to 8 bits.
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(data, flags) if data.size else None
    except cv2.error:  # a size beyond OpenCV's limit
        image = None
    if image is None:
        raise ValueError(f"{name} cannot be decoded")
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{name} has values of type {image.dtype}: it is no grey or colour image")
    # A Bayer mosaic that was compressed as it is: "bayer_rggb8; jpeg compressed bayer_rggb8".
    layout = LAYOUTS.get(message.format.lower().split()[-1] if message.format.split() else "")
    mosaic = layout is not None and layout.channels == 1 and layout.code is not None
    return _Pixels(image, layout.code if mosaic and layout else None)
