"""Cameras: raw pixels to rectified ones and back, disparity to depth."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace

import cv2
import numpy as np
import numpy.typing as npt

# Distortion models of camera_info by the OpenCV functions that know them.
PINHOLE_MODELS = ("plumb_bob", "rational_polynomial")
FISHEYE_MODELS = ("equidistant", "fisheye")
# Other names of the same models: no name at all (as ROS's parser of calibration files takes it),
# Kalibr's, EuRoC's and librealsense's. Spaces and hyphens count as underscores.
SAME_MODELS = {
    "": "plumb_bob",
    "none": "plumb_bob",
    "pinhole": "plumb_bob",
    "radtan": "plumb_bob",
    "radial_tangential": "plumb_bob",
    "brown_conrady": "plumb_bob",
    "kannala_brandt": "equidistant",
    "kannala_brandt4": "equidistant",
}
PINHOLE_COEFFICIENTS, FISHEYE_COEFFICIENTS = (4, 5, 8, 12, 14), (4,)
PLAUSIBLE_BASELINE = (0.001, 5.0)  # metres: from endoscopes to the widest rigs on vehicles

# A map from raw to rectified pixels has a node every MAP_STEP raw pixels, the first one MAP_MARGIN
# pixels left of and above the image. Between the nodes it is linear.
MAP_STEP, MAP_MARGIN = 2, 8
NOWHERE = 1e9  # the map's value where the rectified image plane has no such point
CLOSES = 0.05  # pixels; a point further from itself after there and back has no rectified place


@dataclass(frozen=True)
class StereoCalibration:
    """A rectified pair of cameras, in the terms of ROS's camera_info projection matrices.

    Frame: left rectified optical frame, x right, y down, z forward, metres. Lengths fx, fy and
    principal point cx, cy in pixels; baseline in metres, positive. `offset` is the difference of
    the principal points' columns, cx_left - cx_right, pixels: a point at infinity has disparity
    `offset`, which is 0 for most rigs.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    baseline: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        values = (self.fx, self.fy, self.cx, self.cy, self.baseline, self.offset)
        if not all(math.isfinite(v) for v in values):
            raise ValueError("the projection matrices are not finite")
        if min(self.fx, self.fy) <= 0:
            raise ValueError("the focal lengths must be positive")
        if self.baseline <= 0:
            raise ValueError(f"the baseline must be positive, it is {self.baseline:g} m")

    @classmethod
    def from_projections(
        cls, left: npt.ArrayLike, right: npt.ArrayLike, baseline: float | None = None
    ) -> StereoCalibration:
        """From the 3x4 projection matrices (or their 12 numbers) of both rectified cameras.

        ROS defines P[3] = -fx * Tx, Tx the position of the camera on the x axis that both share. So
        the baseline is the difference of both, whichever camera the axis starts from.

        Args:
            baseline: metres, in place of what the matrices say; None or 0 to take theirs.

        Raises:
            ValueError: not 12 finite numbers each, no positive focal length and baseline (all
                zeros is what an uncalibrated camera sends), or focal lengths that differ.
        """
        p_left = np.asarray(left, np.float64).reshape(-1)
        p_right = np.asarray(right, np.float64).reshape(-1)
        if p_left.size != 12 or p_right.size != 12:
            raise ValueError("a projection matrix has 12 numbers")
        fx = float(p_left[0])
        if not fx > 0 or not p_right[0] > 0:
            raise ValueError(
                "the projection matrix has no focal length: the camera is not calibrated"
            )
        if abs(p_right[0] - fx) > 0.01 * fx:
            raise ValueError(
                f"the projections' focal lengths are {fx:g} and {p_right[0]:g}: "
                "they are not of one rectified pair"
            )
        return cls(
            fx=fx,
            fy=float(p_left[5]),
            cx=float(p_left[2]),
            cy=float(p_left[6]),
            baseline=float(baseline) if baseline else _baseline(p_left, p_right),
            offset=float(p_left[2] - p_right[2]),
        )

    def doubt(self) -> str | None:
        """Why the baseline is implausible, in one sentence; None if it is plausible."""
        shortest, longest = PLAUSIBLE_BASELINE
        if shortest <= self.baseline <= longest:
            return None
        why = "P[3] is probably not in metres times pixels"
        if self.baseline > longest:
            why = f"P[3] is probably in millimetres ({self.baseline:g} mm)"
        return f"a baseline of {self.baseline:g} m is implausible, and so is every depth: {why}"

    def disparity(self, depth: float) -> float:
        """Disparity in pixels of a point at a depth in metres (0 < depth <= inf)."""
        return self.fx * self.baseline / depth + self.offset

    def points(self, xy: np.ndarray, disparity: np.ndarray) -> np.ndarray:
        """Triangulate.

        Args:
            xy: (M, 2) rectified left pixels.
            disparity: (M,) pixels.

        Returns:
            (M, 3) float32, metres; NaN where the disparity is not beyond that of infinity.
        """
        parallax = np.asarray(disparity, np.float64) - self.offset
        with np.errstate(divide="ignore"):
            z = np.where(parallax > 0, self.fx * self.baseline / parallax, np.nan)
        z[~np.isfinite(z)] = np.nan
        x = (xy[:, 0] - self.cx) / self.fx * z
        y = (xy[:, 1] - self.cy) / self.fy * z
        return np.column_stack([x, y, z]).astype(np.float32)


def _baseline(left: np.ndarray, right: np.ndarray) -> float:
    """Metres between two cameras by their projection matrices (12,).

    Raises:
        ValueError: it is not positive.
    """
    baseline = float(left[3] / left[0] - right[3] / right[0])
    remedy = "give it in metres (parameter `baseline`, option --baseline)"
    if baseline == 0:
        which = "is 0" if right[3] == 0 else f"is {right[3]:g} as in the left camera's"
        raise ValueError(
            f"P[3] of the right camera {which}, so the baseline is 0 and nothing has a depth: "
            f"{remedy}"
        )
    if baseline < 0:
        raise ValueError(
            f"the baseline is negative ({baseline:g} m; P[3] is {left[3]:g} left and {right[3]:g} "
            f"right): either left and right are swapped, or the sign of P[3] is wrong; {remedy}"
        )
    return baseline


def distortion(model: str, coefficients: npt.ArrayLike) -> tuple[str, tuple[float, ...]]:
    """A distortion model as OpenCV's functions take it, from what drivers and files say.

    Other names of a model become ROS's name. Zeros at the end are dropped or added, so that the
    number of coefficients is one that OpenCV knows; that changes nothing of the model.

    Args:
        model: name, may be empty.
        coefficients: any number of them, any shape.

    Returns:
        One of `PINHOLE_MODELS` and `FISHEYE_MODELS`, and the coefficients.

    Raises:
        ValueError: a model that is not known, or too many coefficients for it.
    """
    name = "_".join(model.lower().replace("-", " ").replace("_", " ").split())
    name = SAME_MODELS.get(name, name)
    known = PINHOLE_MODELS + FISHEYE_MODELS
    if name not in known:
        raise ValueError(f"distortion model {model!r} is not known; known are {', '.join(known)}")
    values = np.asarray(coefficients, np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise ValueError("the distortion coefficients are not finite")
    used = int(np.flatnonzero(values)[-1]) + 1 if values.any() else 0
    counts = FISHEYE_COEFFICIENTS if name in FISHEYE_MODELS else PINHOLE_COEFFICIENTS
    if used > counts[-1]:
        raise ValueError(f"{name} has {counts[-1]} coefficients at most, here are {used}")
    count = next(n for n in counts if n >= used)
    result = np.zeros(count)
    result[:used] = values[:used]
    return name, tuple(map(float, result))


@dataclass(frozen=True)
class Window:
    """The part of the sensor that an image shows: `roi` and `binning` of camera_info.

    x, y, width, height in pixels of the full resolution; a width or height of 0 is the whole
    sensor, a binning of 0 is none.
    """

    x: int = 0
    y: int = 0
    width: int = 0
    height: int = 0
    binning_x: int = 0
    binning_y: int = 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the image, from those of the sensor."""
        return (
            (self.width or width) // max(1, self.binning_x),
            (self.height or height) // max(1, self.binning_y),
        )

    def of(self, matrix: np.ndarray) -> np.ndarray:
        """K (3, 3) or P (3, 4) of the sensor for the image, as ROS's image_geometry has it."""
        moved = np.array(matrix, np.float64)
        moved[:2, 2] -= self.x, self.y
        moved[:2] /= np.array([[max(1, self.binning_x)], [max(1, self.binning_y)]])
        return moved


WHOLE = Window()  # images of the whole sensor, not binned


def image_matrices(
    k: np.ndarray, p: np.ndarray, sensor: tuple[int, int], window: Window, image: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """K (3, 3) and P (3, 4) for the image as it comes.

    An image of the sensor's size is taken as it is, even where camera_info names a binning or a
    region: the calibration was made for this size.

    Args:
        sensor: width and height that the calibration is for; (0, 0) if unknown.
        image: width and height.

    Raises:
        ValueError: the calibration is for images of another size.
    """
    if image == sensor or sensor == (0, 0):
        return k, p
    expected = window.size(*sensor)
    if image == expected:
        return window.of(k), window.of(p)
    sizes = "{}x{}".format(*sensor)
    if expected != sensor:
        sizes += ", with its region and binning for {}x{}".format(*expected)
    raise ValueError("the calibration is for {}, the image has {}x{}".format(sizes, *image))


@dataclass(frozen=True)
class Camera:
    """One camera of a stereo rig as its camera_info describes it.

    `k` (9 numbers) and `d` are the raw camera's matrix and distortion, `r` (9) its rotation into
    the rectified frame, `p` (12) the projection matrix after that. `width`, `height` are the size
    that these are for, `window` is the part of it that images show (see `for_image`). `model` and
    `d` are brought into OpenCV's terms by `distortion`.

    Raises:
        ValueError: a distortion model that is not known, or numbers that are no calibration.
    """

    width: int
    height: int
    model: str
    k: tuple[float, ...]
    d: tuple[float, ...]
    r: tuple[float, ...]
    p: tuple[float, ...]
    window: Window = WHOLE

    def __post_init__(self) -> None:
        model, d = distortion(self.model, self.d)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "d", d)
        if (len(self.k), len(self.r), len(self.p)) != (9, 9, 12):
            raise ValueError("k, r and p must have 9, 9 and 12 numbers")
        if not np.isfinite([*self.k, *self.r, *self.p]).all():
            raise ValueError("the calibration is not finite")
        if min(self.k[0], self.k[4], self.p[0], self.p[5]) <= 0:
            raise ValueError("the camera has no focal length: it is not calibrated")
        rotation = np.reshape(self.r, (3, 3))
        if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3):
            raise ValueError("r is no rotation: the camera is not calibrated for rectification")

    def for_image(self, width: int, height: int) -> Camera:
        """The camera of images of this size, with K and P for the pixels of the image.

        Raises:
            ValueError: it is for images of another size.
        """
        matrices = np.reshape(self.k, (3, 3)), np.reshape(self.p, (3, 4))
        size = (self.width, self.height)
        matrices = image_matrices(*matrices, size, self.window, (width, height))
        k, p = (tuple(map(float, matrix.ravel())) for matrix in matrices)
        return replace(self, width=width, height=height, k=k, p=p, window=WHOLE)

    @property
    def fisheye(self) -> bool:
        """Whether OpenCV's fisheye functions apply."""
        return self.model in FISHEYE_MODELS

    def _matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        k, r = np.reshape(self.k, (3, 3)), np.reshape(self.r, (3, 3))
        return k, np.array(self.d), r, np.reshape(self.p, (3, 4))[:, :3]

    def rectify(self, xy: np.ndarray) -> np.ndarray:
        """Raw pixels (N, 2) to rectified ones (N, 2), NaN where there is no such point."""
        k, d, r, p = self._matrices()
        raw = np.asarray(xy, np.float64).reshape(-1, 1, 2)
        exact = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 50, 1e-10)
        if self.fisheye:
            found = cv2.fisheye.undistortPoints(raw, k, d, R=r, P=p, criteria=exact)
        else:
            found = cv2.undistortPointsIter(raw, k, d, r, p, exact)
        found = found[:, 0]
        # A lens model folds over somewhere beyond the image's corners; a point must come back.
        back = self.unrectify(np.where(np.isfinite(found), found, 0.0))
        closes = np.abs(back - raw[:, 0]).max(1) < CLOSES
        return np.where((closes & np.isfinite(found).all(1))[:, None], found, np.nan)

    def unrectify(self, xy: np.ndarray) -> np.ndarray:
        """Rectified pixels (N, 2) to raw ones (N, 2), NaN behind the camera."""
        k, d, r, p = self._matrices()
        ones = np.ones((len(xy), 1))
        rays = np.hstack([np.asarray(xy, np.float64), ones]) @ np.linalg.inv(p).T @ r
        z = rays[:, 2:]
        flat = np.divide(rays[:, :2], z, out=np.full((len(xy), 2), np.nan), where=z > 1e-9)
        ahead = np.isfinite(flat).all(1)
        raw = np.full((len(xy), 2), np.nan)
        if not ahead.any():
            return raw
        if self.fisheye:
            raw[ahead] = cv2.fisheye.distortPoints(flat[ahead, None], k, d)[:, 0]
        else:
            rays = np.hstack([flat[ahead], ones[ahead]])
            raw[ahead] = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), k, d)[0][:, 0]
        return raw

    def map(self) -> np.ndarray:
        """Rectified place of each node of the grid over the raw image, (2, h, w) float32."""
        x = np.arange(-MAP_MARGIN, self.width + MAP_MARGIN + 1, MAP_STEP)
        y = np.arange(-MAP_MARGIN, self.height + MAP_MARGIN + 1, MAP_STEP)
        places = self.rectify(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2))
        places = np.where(np.isnan(places), NOWHERE, places).astype(np.float32)
        return np.ascontiguousarray(places.T.reshape(2, len(y), len(x)))


@dataclass(frozen=True)
class RawStereoCalibration(StereoCalibration):
    """A pair of cameras whose images are raw: the rectified pair, and the way there.

    `maps` (2, 2, h, w) float32 are the left and right `Camera.map`.
    """

    maps: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    width: int = 0
    height: int = 0

    @classmethod
    def from_cameras(
        cls, left: Camera, right: Camera, baseline: float | None = None
    ) -> RawStereoCalibration:
        """Make the maps; takes a while (0.1 s for 640x480).

        Args:
            baseline: metres, in place of what the cameras' projection matrices say.

        Raises:
            ValueError: cameras of different sizes, or no baseline between them.
        """
        if (left.width, left.height) != (right.width, right.height):
            raise ValueError(
                f"the left camera is for {left.width}x{left.height}, the right one for "
                f"{right.width}x{right.height}: both must have one size"
            )
        rectified = StereoCalibration.from_projections(left.p, right.p, baseline)
        maps = np.stack([left.map(), right.map()])
        return cls(**asdict(rectified), maps=maps, width=left.width, height=left.height)


def identity_maps(width: int, height: int) -> np.ndarray:
    """Maps (2, 2, h, w) of cameras whose raw images are rectified already."""
    x = np.arange(-MAP_MARGIN, width + MAP_MARGIN + 1, MAP_STEP, dtype=np.float32)
    y = np.arange(-MAP_MARGIN, height + MAP_MARGIN + 1, MAP_STEP, dtype=np.float32)
    return np.stack([np.stack(np.meshgrid(x, y))] * 2)
