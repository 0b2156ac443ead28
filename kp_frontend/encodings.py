"""Images in the encodings of ROS to grey ones. One conversion for the node, bags and training.

An image is any object with the fields of sensor_msgs/Image (`data`, `encoding`, `width`, `height`,
`step`, `is_bigendian`) or of sensor_msgs/CompressedImage (`data`, `format`). Nothing of ROS is
imported.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

BIT_DEPTHS = (8, 10, 12, 14, 16)  # of sensors
BIT_DEPTH_CHOICES = ("auto", *map(str, BIT_DEPTHS))


@dataclass(frozen=True)
class Layout:
    """How an encoding stores an image.

    `bits` of a value, `channels` of a pixel; `code`, OpenCV's conversion to grey; `luma`, the
    channel that is the grey value already; `planes`, the bytes of a whole image for each byte of
    its first plane, which holds the grey values.
    """

    bits: int
    channels: int
    code: int | None = None
    luma: int = 0
    planes: float = 1.0


_COLOURS = {"bgr": (3, cv2.COLOR_BGR2GRAY), "rgb": (3, cv2.COLOR_RGB2GRAY),
            "bgra": (4, cv2.COLOR_BGRA2GRAY), "rgba": (4, cv2.COLOR_RGBA2GRAY)}  # fmt: skip
# ROS names a Bayer pattern by the first two pixels of its first two rows, OpenCV by the second and
# third of its second row.
_BAYER = {"rggb": cv2.COLOR_BayerBG2GRAY, "bggr": cv2.COLOR_BayerRG2GRAY,
          "gbrg": cv2.COLOR_BayerGR2GRAY, "grbg": cv2.COLOR_BayerGB2GRAY}  # fmt: skip
_BITS = (8, 16)
# All names are compared in lower case.
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
DEPTH = "16uc1"  # usually a depth image: read as a grey one only if a bit depth is given


@dataclass(frozen=True)
class _Pixels:
    """Values (H, W) or (H, W, C), uint8 or uint16 in this machine's byte order, and their code."""

    values: np.ndarray
    code: int | None

    def grey(self, bit_depth: int) -> np.ndarray:
        """(H, W) uint8; values of 16 bits are scaled so that 2^bit_depth - 1 becomes 255."""
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
    """The grey image of pixels in one of the encodings of sensor_msgs/image_encodings.

    Args:
        data: bytes, `step` for each row.
        encoding: its name, in any case.
        bit_depth: bits in use of values of 16 bits; the largest becomes 255, greater ones too.

    Returns:
        (height, width) uint8; a view of `data` where it is grey already.

    Raises:
        ValueError: an encoding that is no image's, or sizes that do not fit each other.
    """
    return _unpack(data, encoding, width, height, step, is_bigendian).grey(bit_depth)


class GreyConverter:
    """Makes grey images of image messages, and finds out the bit depth of 16-bit ones.

    With `auto` the bit depth is the smallest of `BIT_DEPTHS` that holds the greatest value seen so
    far. It grows when a greater value comes and never falls.

    Args:
        bit_depth: one of `BIT_DEPTH_CHOICES`. A number also lets 16UC1 be read as an image.
        say: called with a sentence whenever `auto` takes another bit depth.

    Raises:
        ValueError: another bit depth.
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
        """The grey image (H, W) uint8 of a message; a view of its data if that is grey.

        Raises:
            ValueError: it cannot be decoded; the reason is one line.
        """
        return self.images([message])[0]

    def images(self, messages: Sequence[Any], names: Sequence[str] = ()) -> list[np.ndarray]:
        """The grey images of messages that belong together, all with one bit depth.

        Args:
            names: of the images, for the reasons.

        Raises:
            ValueError: one cannot be decoded; the reason is one line.
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
        """A sentence if values came that are too great for the bit depth that was given."""
        if self._given is None or self.greatest < 2**self._given:
            return ""
        return (
            f"16-bit images have values up to {self.greatest}, bit_depth {self._given} makes all "
            f"above {2**self._given - 1} white: set it to a greater one, or to auto"
        )

    def unused_bits(self) -> str:
        """A sentence if the values so far need much less than the bit depth that was given."""
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
    """Bytes of a row of the first plane: `step` is that, or a share of all planes' bytes."""
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
    # As it is stored: neither turned by EXIF's orientation nor reduced to 8 bits.
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
