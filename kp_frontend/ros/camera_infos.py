"""Finds the calibration of each pair from the camera_info messages."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
from sensor_msgs.msg import CameraInfo

from kp_frontend.calibration import Camera, StereoCalibration
from kp_frontend.ros.messages import calibration_from_info, camera_from_info, stamp_ns

PATIENCE = 0.02  # seconds that a pair waits for a camera_info of its own stamp
KEPT = 30  # camera_infos remembered per camera

Infos = tuple[CameraInfo, CameraInfo]
Cameras = tuple[Camera, Camera]


class CameraInfos:
    """The camera_info messages of both cameras. Written by the executor, read by the worker.

    Args:
        raw: whether the images are raw. Then the calibration must contain the rectification.
        baseline: metres, overrides camera_info; 0 uses camera_info. With a baseline, rectified
            images need the camera_info of one camera only, because both have the same projection.
    """

    def __init__(self, raw: bool, baseline: float = 0.0) -> None:
        self.raw, self.baseline = raw, baseline
        self._recent = tuple(deque[CameraInfo](maxlen=KEPT) for _ in range(2))
        self._news = threading.Condition()
        self._stamped_alike = True  # so far, infos have the time stamps of their images
        self._last: tuple[tuple, StereoCalibration | ValueError, Cameras | None] | None = None

    def add(self, side: int, info: CameraInfo) -> None:
        """Store a camera_info of the left (0) or right (1) camera.

        It replaces the last one if both have the same time stamp. The same message can arrive
        through two subscriptions.
        """
        with self._news:
            recent = self._recent[side]
            if recent and stamp_ns(recent[-1]) == stamp_ns(info):
                recent.pop()
            recent.append(info)
            self._news.notify_all()

    def clear(self) -> None:
        """Forget all but the newest camera_info of each camera, after a time jump."""
        with self._news:
            for infos in self._recent:
                while len(infos) > 1:
                    infos.popleft()

    def missing(self) -> list[int]:
        """The sides without any camera_info so far."""
        with self._news:
            return [side for side, infos in enumerate(self._recent) if not infos]

    def needed(self) -> list[int]:
        """The missing sides that the calibration needs."""
        missing = self.missing()
        return [] if self._one_is_enough and len(missing) == 1 else missing

    @property
    def _one_is_enough(self) -> bool:
        return self.baseline > 0 and not self.raw

    def cameras(self) -> Cameras | None:
        """The cameras of the last pair, or None if they are not fully calibrated."""
        return self._last[2] if self._last else None

    def of_pair(self, stamps: tuple[int, int], size: tuple[int, int]) -> StereoCalibration | None:
        """The calibration of a pair, or None if there is no camera_info yet.

        Args:
            stamps: time stamps of the images, nanoseconds.
            size: width and height of the images.

        Raises:
            ValueError: the camera_infos are invalid. The message gives the reason.
        """
        infos = self._find(stamps)
        if infos is None:
            return None
        key = (size, *(_numbers(info) for info in infos))
        if self._last is None or self._last[0] != key:
            self._last = key, *self._make(infos, size)
        if isinstance(self._last[1], ValueError):
            raise ValueError(str(self._last[1]))
        return self._last[1]

    def _make(
        self, infos: Infos, size: tuple[int, int]
    ) -> tuple[StereoCalibration | ValueError, Cameras | None]:
        try:
            cameras: Cameras | None = (
                camera_from_info(infos[0], size),
                camera_from_info(infos[1], size),
            )
        except ValueError:  # rectified images need only P
            cameras = None
        try:
            return calibration_from_info(*infos, size, self.raw, self.baseline), cameras
        except ValueError as error:
            return error, cameras

    def _find(self, stamps: tuple[int, int]) -> Infos | None:
        """The infos with the time stamps of a pair, or the newest ones if these do not arrive
        within `PATIENCE`; None without any infos."""

        def exact() -> Infos | None:
            left, right = (
                next((info for info in reversed(infos) if stamp_ns(info) == stamp), None)
                for infos, stamp in zip(self._recent, stamps, strict=True)
            )
            return None if left is None or right is None else (left, right)

        with self._news:
            if not all(self._recent):
                there = next((infos[-1] for infos in self._recent if infos), None)
                return (there, there) if there and self._one_is_enough else None
            # If the infos of the last pair had other time stamps, do not wait for these either.
            found = self._news.wait_for(exact, PATIENCE if self._stamped_alike else 0.0)
            self._stamped_alike = bool(found)
            return found or (self._recent[0][-1], self._recent[1][-1])


def _numbers(info: CameraInfo) -> tuple:
    """All values that a calibration depends on, as a hashable key."""
    parts = (info.d, info.k, info.r, info.p)
    numbers = (np.asarray(part, np.float64).tobytes() for part in parts)
    roi = info.roi
    region = (roi.x_offset, roi.y_offset, roi.width, roi.height)
    window = (*region, info.binning_x, info.binning_y)
    return info.width, info.height, info.distortion_model, window, *numbers
