"""Stereo frames of sequences, rectified or raw, and their cameras."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import cv2
import numpy as np

from kp_frontend.calibration import (
    FISHEYE_MODELS,
    WHOLE,
    RawStereoCalibration,
    StereoCalibration,
    Window,
    distortion,
    image_matrices,
)
from kp_frontend.calibration import Camera as Lens

# Computing its tables is slow, and cameras rarely change.
_raw_calibration = lru_cache(maxsize=4)(RawStereoCalibration.from_cameras)


def size_text(image: np.ndarray) -> str:
    """Width and height of an image (H, W), for a message to the user."""
    return f"{image.shape[1]}x{image.shape[0]}"


@dataclass(frozen=True)
class Camera:
    """One camera of a rig, as in ROS's camera_info.

    `k` (3, 3): intrinsics of the raw image; `d` (n,): its distortion; `r` (3, 3): rectifying
    rotation; `p` (3, 4): projection of the rectified image. All zero means not calibrated. `width`
    and `height` are the sensor size of these matrices, `window` the part of it that images show.
    """

    width: int
    height: int
    k: np.ndarray
    d: np.ndarray
    r: np.ndarray
    p: np.ndarray
    model: str = "plumb_bob"
    window: Window = WHOLE

    @classmethod
    def rectified(cls, width: int, height: int, p: np.ndarray) -> Camera:
        """The camera of a rectified image with projection `p` (3, 4)."""
        return cls(width, height, p[:, :3].copy(), np.zeros(5), np.eye(3), p)

    @classmethod
    def unknown(cls, width: int, height: int) -> Camera:
        """A camera that is not calibrated."""
        zero = np.zeros
        return cls(width, height, zero((3, 3)), zero(0), zero((3, 3)), zero((3, 4)), "")

    @property
    def distorted(self) -> bool:
        """Whether the raw image differs from the rectified one."""
        return bool(self.d.any()) or not np.allclose(self.k, self.p[:, :3])

    def for_image(self, image: np.ndarray) -> Camera:
        """The camera of an image (H, W), with K and P for the pixels of the image.

        Raises:
            ValueError: the camera is for images of another size.
        """
        height, width = image.shape
        sensor = (self.width, self.height)
        k, p = image_matrices(self.k, self.p, sensor, self.window, (width, height))
        return replace(self, width=width, height=height, k=k, p=p, window=WHOLE)

    def lens(self) -> Lens:
        """This camera in the form that the front end takes for raw images.

        Raises:
            ValueError: the distortion model is unknown, or there is no calibration.
        """
        k, d, r, p = (tuple(map(float, v.ravel())) for v in (self.k, self.d, self.r, self.p))
        return Lens(self.width, self.height, self.model, k, d, r, p)

    def rectify(self, image: np.ndarray) -> np.ndarray:
        """Rectify a raw image, bilinear; pixels outside the raw image are black.

        Raises:
            ValueError: the distortion model is unknown, or there is no calibration.
        """
        if not self.p[0, 0] > 0 or not self.k[0, 0] > 0:
            raise ValueError("raw images without a calibration cannot be rectified")
        camera = self.for_image(image)
        model, d = distortion(self.model, self.d)
        library = cv2.fisheye if model in FISHEYE_MODELS else cv2
        size = (camera.width, camera.height)
        maps = library.initUndistortRectifyMap(
            camera.k, np.array(d), camera.r, camera.p[:, :3], size, cv2.CV_32FC1
        )
        return cv2.remap(image, *maps, cv2.INTER_LINEAR)


@dataclass(frozen=True)
class StereoFrame:
    """One pair of a sequence and its ground truth.

    - `stamp`: nanoseconds
    - `left`, `right`: (H, W) uint8
    - `disparity`: (H, W) float32, true disparity of the left image, NaN where unknown
    - `pose`: (4, 4), true pose of the (rectified) left camera in the world, z forward
    - `camera`: name of the rig; a change of rig starts a new sequence
    - `raw`: the images are not rectified
    - `baseline`: metres, overrides the baseline of the cameras' projections
    """

    stamp: int
    left: np.ndarray
    right: np.ndarray
    cameras: tuple[Camera, Camera] | None = None
    disparity: np.ndarray | None = None
    pose: np.ndarray | None = None
    camera: str = ""
    raw: bool = False
    baseline: float | None = None

    def calibration(self) -> StereoCalibration | None:
        """The calibration of the pair for the front end; None if it is not calibrated.

        Raises:
            ValueError: the cameras are for another size, or have no baseline or an unknown lens
                model.
        """
        if self.cameras is None or not self.cameras[0].p.any():
            return None
        images = (self.left, self.right)
        cameras = [c.for_image(i) for c, i in zip(self.cameras, images, strict=True)]
        if self.raw:
            return _raw_calibration(*(camera.lens() for camera in cameras), self.baseline)
        return StereoCalibration.from_projections(cameras[0].p, cameras[1].p, self.baseline)

    def rectified(self) -> StereoFrame:
        """The pair with rectified images.

        Raises:
            ValueError: the images are raw and there is no calibration.
        """
        if not self.raw:
            return self
        if self.cameras is None:
            raise ValueError("raw images without camera_info cannot be rectified")
        images = (c.rectify(i) for c, i in zip(self.cameras, (self.left, self.right), strict=True))
        left, right = images
        shown = (c.for_image(left) for c in self.cameras)
        one, other = (Camera.rectified(c.width, c.height, c.p) for c in shown)
        return replace(self, left=left, right=right, cameras=(one, other), raw=False)


@dataclass
class Sequence:
    """Frames of a sequence, read on demand, and the reasons for those skipped so far."""

    kind: str
    frames: Iterator[StereoFrame]
    length: int
    raw: bool = False  # images are not rectified
    left_out: list[str] = field(default_factory=list)
