"""Cameras: raw pixels to rectified ones and back, disparity to depth."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

# Distortion models of camera_info by the OpenCV functions that know them.
PINHOLE_MODELS = ("plumb_bob", "rational_polynomial")
FISHEYE_MODELS = ("equidistant", "fisheye")
PINHOLE_COEFFICIENTS, FISHEYE_COEFFICIENTS = (0, 4, 5, 8, 12, 14), (0, 4)

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
            raise ValueError(f"calibration is not finite: {self}")
        if min(self.fx, self.fy, self.baseline) <= 0:
            raise ValueError(f"focal lengths and baseline must be positive: {self}")

    @classmethod
    def from_projections(cls, left: npt.ArrayLike, right: npt.ArrayLike) -> StereoCalibration:
        """From the 3x4 projection matrices (or their 12 numbers) of both rectified cameras.

        As ROS defines them: right[0, 3] = -fx * baseline.

        Raises:
            ValueError: not 12 finite numbers each, no positive focal length and baseline (all
                zeros is what an uncalibrated camera sends), or focal lengths that differ.
        """
        p_left = np.asarray(left, np.float64).reshape(-1)
        p_right = np.asarray(right, np.float64).reshape(-1)
        if p_left.size != 12 or p_right.size != 12:
            raise ValueError("a projection matrix has 12 numbers")
        fx = float(p_left[0])
        if fx <= 0 or p_right[0] <= 0:
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
            baseline=float(p_left[3] / fx - p_right[3] / p_right[0]),
            offset=float(p_left[2] - p_right[2]),
        )

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


@dataclass(frozen=True)
class Camera:
    """One camera of a stereo rig as its camera_info describes it.

    `k` (9 numbers) and `d` are the raw camera's matrix and distortion, `r` (9) its rotation into
    the rectified frame, `p` (12) the projection matrix after that.

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

    def __post_init__(self) -> None:
        if self.model not in PINHOLE_MODELS + FISHEYE_MODELS:
            raise ValueError(
                f"distortion model {self.model!r} is not known: "
                f"{', '.join(PINHOLE_MODELS + FISHEYE_MODELS)} are"
            )
        counts = FISHEYE_COEFFICIENTS if self.fisheye else PINHOLE_COEFFICIENTS
        if len(self.d) not in counts:
            raise ValueError(f"{self.model} with {len(self.d)} coefficients, may have {counts}")
        if (len(self.k), len(self.r), len(self.p)) != (9, 9, 12):
            raise ValueError("k, r and p must have 9, 9 and 12 numbers")
        if not np.isfinite([*self.k, *self.d, *self.r, *self.p]).all():
            raise ValueError("the calibration is not finite")
        if min(self.k[0], self.k[4], self.p[0], self.p[5]) <= 0:
            raise ValueError("the camera has no focal length: it is not calibrated")
        rotation = np.reshape(self.r, (3, 3))
        if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3):
            raise ValueError("r is no rotation: the camera is not calibrated for rectification")

    @property
    def fisheye(self) -> bool:
        """Whether OpenCV's fisheye functions apply."""
        return self.model in FISHEYE_MODELS

    def _matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        k, r = np.reshape(self.k, (3, 3)), np.reshape(self.r, (3, 3))
        return k, np.array(self.d or (0.0,) * 4), r, np.reshape(self.p, (3, 4))[:, :3]

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
    def from_cameras(cls, left: Camera, right: Camera) -> RawStereoCalibration:
        """Make the maps; takes a while (0.1 s for 640x480).

        Raises:
            ValueError: cameras of different sizes, or no baseline between them.
        """
        if (left.width, left.height) != (right.width, right.height):
            raise ValueError("the cameras' images have different sizes")
        rectified = StereoCalibration.from_projections(left.p, right.p)
        maps = np.stack([left.map(), right.map()])
        return cls(**asdict(rectified), maps=maps, width=left.width, height=left.height)


def identity_maps(width: int, height: int) -> np.ndarray:
    """Maps (2, 2, h, w) of cameras whose raw images are rectified already."""
    x = np.arange(-MAP_MARGIN, width + MAP_MARGIN + 1, MAP_STEP, dtype=np.float32)
    y = np.arange(-MAP_MARGIN, height + MAP_MARGIN + 1, MAP_STEP, dtype=np.float32)
    return np.stack([np.stack(np.meshgrid(x, y))] * 2)
