"""Camera models: raw to rectified pixels and back, disparity to depth."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace

import cv2
import numpy as np
import numpy.typing as npt

# Distortion models of camera_info, by the OpenCV functions that support them.
PINHOLE_MODELS = ("plumb_bob", "rational_polynomial")
FISHEYE_MODELS = ("equidistant", "fisheye")
# Other names of the same models: no name (as in ROS's parser of calibration files), and the names
# of Kalibr, EuRoC and librealsense. Spaces and hyphens count as underscores.
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

# A map from raw to rectified pixels has a node every MAP_STEP raw pixels. The first node is
# MAP_MARGIN pixels left of and above the image. Values between the nodes are interpolated linearly.
MAP_STEP, MAP_MARGIN = 2, 8
NOWHERE = 1e9  # value of the map for pixels that have no rectified position
CLOSES = 0.05  # pixels; maximum error after `rectify` and `unrectify` of a valid pixel


@dataclass(frozen=True)
class StereoCalibration:
    """A rectified stereo camera, as defined by the projection matrices in camera_info.

    Frame: left rectified optical frame, x right, y down, z forward, metres. Focal lengths fx, fy
    and principal point cx, cy in pixels; baseline in metres, positive. `offset` is cx_left -
    cx_right in pixels: the disparity of a point at infinity, which is 0 for most rigs.
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
        """Create from the 3x4 projection matrices (or their 12 numbers) of both rectified cameras.

        ROS defines P[3] = -fx * Tx, where Tx is the position of the camera on the common x axis. So
        the baseline is the difference of both positions, wherever the axis starts.

        Args:
            baseline: metres, overrides the matrices; None or 0 uses the matrices.

        Raises:
            ValueError: not 12 finite numbers each, no positive focal length or baseline (an
                uncalibrated camera sends zeros), or different focal lengths.
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
        """The reason why the baseline is implausible; None if it is plausible."""
        shortest, longest = PLAUSIBLE_BASELINE
        if shortest <= self.baseline <= longest:
            return None
        why = "P[3] is probably not in metres times pixels"
        if self.baseline > longest:
            why = f"P[3] is probably in millimetres ({self.baseline:g} mm)"
        return f"a baseline of {self.baseline:g} m is implausible, so all depths are wrong: {why}"

    def disparity(self, depth: float) -> float:
        """Disparity in pixels of a point at a depth in metres (0 < depth <= inf)."""
        return self.fx * self.baseline / depth + self.offset

    def points(self, xy: np.ndarray, disparity: np.ndarray) -> np.ndarray:
        """Triangulate.

        Args:
            xy: (M, 2) rectified left pixels.
            disparity: (M,) pixels.

        Returns:
            (M, 3) float32, metres; NaN if the disparity is not larger than that of infinity.
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
    """Convert a distortion model from camera_info or a file to the form that OpenCV needs.

    Other names of a model become ROS's name. Trailing zeros are removed or added so that OpenCV
    accepts the number of coefficients. This does not change the model.

    Args:
        model: name, may be empty.
        coefficients: any number, any shape.

    Returns:
        One of `PINHOLE_MODELS` and `FISHEYE_MODELS`, and the coefficients.

    Raises:
        ValueError: an unknown model, or too many coefficients for it.
    """
    name = "_".join(model.lower().replace("-", " ").replace("_", " ").split())
    name = SAME_MODELS.get(name, name)
    known = PINHOLE_MODELS + FISHEYE_MODELS
    if name not in known:
        raise ValueError(f"distortion model {model!r} is not known; use one of {', '.join(known)}")
    values = np.asarray(coefficients, np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise ValueError("the distortion coefficients are not finite")
    used = int(np.flatnonzero(values)[-1]) + 1 if values.any() else 0
    counts = FISHEYE_COEFFICIENTS if name in FISHEYE_MODELS else PINHOLE_COEFFICIENTS
    if used > counts[-1]:
        raise ValueError(f"{name} has at most {counts[-1]} coefficients, not {used}")
    count = next(n for n in counts if n >= used)
    result = np.zeros(count)
    result[:used] = values[:used]
    return name, tuple(map(float, result))


@dataclass(frozen=True)
class Window:
    """The part of the sensor that an image shows: `roi` and `binning` of camera_info.

    x, y, width, height in pixels of the full resolution. A width or height of 0 means the whole
    sensor, a binning of 0 means no binning.
    """

    x: int = 0
    y: int = 0
    width: int = 0
    height: int = 0
    binning_x: int = 0
    binning_y: int = 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the image for those of the sensor."""
        return (
            (self.width or width) // max(1, self.binning_x),
            (self.height or height) // max(1, self.binning_y),
        )

    def of(self, matrix: np.ndarray) -> np.ndarray:
        """Convert K (3, 3) or P (3, 4) from the sensor to the image, as in image_geometry."""
        moved = np.array(matrix, np.float64)
        moved[:2, 2] -= self.x, self.y
        moved[:2] /= np.array([[max(1, self.binning_x)], [max(1, self.binning_y)]])
        return moved


WHOLE = Window()  # the whole sensor without binning


def image_matrices(
    k: np.ndarray, p: np.ndarray, sensor: tuple[int, int], window: Window, image: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """K (3, 3) and P (3, 4) for an image.

    If the image has the size of the sensor, K and P are unchanged, even if camera_info has a
    binning or a region: the calibration is for this size.

    Args:
        sensor: width and height of the calibration; (0, 0) if unknown.
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
    """One camera of a stereo rig, as described by its camera_info.

    `k` (9 numbers) and `d` are the matrix and the distortion of the raw camera, `r` (9) is the
    rotation into the rectified frame, `p` (12) is the projection matrix of the rectified camera.
    `width` and `height` are the image size of the calibration, `window` is the part of it that
    images show (see `for_image`). `distortion` converts `model` and `d` for OpenCV.

    Raises:
        ValueError: an unknown distortion model, or an invalid calibration.
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
        """The camera for images of this size, with K and P in pixels of the image.

        Raises:
            ValueError: the calibration is for another image size.
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
        """Convert raw pixels (N, 2) to rectified pixels (N, 2), NaN if there is no such point."""
        k, d, r, p = self._matrices()
        raw = np.asarray(xy, np.float64).reshape(-1, 1, 2)
        exact = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 50, 1e-10)
        if self.fisheye:
            found = cv2.fisheye.undistortPoints(raw, k, d, R=r, P=p, criteria=exact)
        else:
            found = cv2.undistortPointsIter(raw, k, d, r, p, exact)
        found = found[:, 0]
        # Beyond the image corners a lens model is ambiguous. Check that `unrectify` inverts it.
        back = self.unrectify(np.where(np.isfinite(found), found, 0.0))
        closes = np.abs(back - raw[:, 0]).max(1) < CLOSES
        return np.where((closes & np.isfinite(found).all(1))[:, None], found, np.nan)

    def unrectify(self, xy: np.ndarray) -> np.ndarray:
        """Convert rectified pixels (N, 2) to raw pixels (N, 2), NaN behind the camera."""
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
        """Rectified position of each node of the grid over the raw image, (2, h, w) float32."""
        x = np.arange(-MAP_MARGIN, self.width + MAP_MARGIN + 1, MAP_STEP)
        y = np.arange(-MAP_MARGIN, self.height + MAP_MARGIN + 1, MAP_STEP)
        places = self.rectify(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2))
        places = np.where(np.isnan(places), NOWHERE, places).astype(np.float32)
        return np.ascontiguousarray(places.T.reshape(2, len(y), len(x)))


@dataclass(frozen=True)
class RawStereoCalibration(StereoCalibration):
    """A stereo camera with raw images: the rectified cameras and the maps from raw to rectified.

    `maps` (2, 2, h, w) float32 are the left and right `Camera.map`.
    """

    maps: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    width: int = 0
    height: int = 0

    def __eq__(self, other: object) -> bool:
        """Equal calibrations have equal maps as well."""
        if self is other or not isinstance(other, RawStereoCalibration):
            return self is other
        numbers = (f.name for f in fields(self) if f.compare)
        return all(getattr(self, n) == getattr(other, n) for n in numbers) and np.array_equal(
            self.maps, other.maps
        )

    @classmethod
    def from_cameras(
        cls, left: Camera, right: Camera, baseline: float | None = None
    ) -> RawStereoCalibration:
        """Compute the maps. This takes about 0.1 s for 640x480 images.

        Args:
            baseline: metres, overrides the projection matrices.

        Raises:
            ValueError: the cameras have different image sizes, or there is no baseline.
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
    """Maps (2, 2, h, w) that do not change positions, for images that are already rectified."""
    x = np.arange(-MAP_MARGIN, width + MAP_MARGIN + 1, MAP_STEP, dtype=np.float32)
    y = np.arange(-MAP_MARGIN, height + MAP_MARGIN + 1, MAP_STEP, dtype=np.float32)
    return np.stack([np.stack(np.meshgrid(x, y))] * 2)
