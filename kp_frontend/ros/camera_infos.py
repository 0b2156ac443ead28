"""From camera_info messages to the calibration of a pair."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
from sensor_msgs.msg import CameraInfo, Image

from kp_frontend.calibration import RawStereoCalibration, StereoCalibration
from kp_frontend.ros.messages import calibration_from_info, camera_from_info, stamp_ns

PATIENCE = 0.02  # seconds that a pair waits for a camera_info of its own stamp
KEPT = 30  # camera_infos remembered per camera


class CameraInfos:
    """Camera infos of both cameras; written by the executor, read by the worker.

    Args:
        raw: whether the images are raw, so that the calibration must say how to rectify points.
    """

    def __init__(self, raw: bool) -> None:
        self.raw = raw
        self._recent = tuple(deque[CameraInfo](maxlen=KEPT) for _ in range(2))
        self._news = threading.Condition()
        self._stamped_alike = True  # infos come with their images' stamps, as far as is known
        self._last: tuple[tuple, StereoCalibration | ValueError] | None = None

    def add(self, side: int, info: CameraInfo) -> None:
        """Remember an info of the left (0) or right (1) camera."""
        with self._news:
            self._recent[side].append(info)
            self._news.notify_all()

    def clear(self) -> None:
        """Forget everything but the newest of each camera: time has jumped."""
        with self._news:
            for infos in self._recent:
                while len(infos) > 1:
                    infos.popleft()

    def missing(self) -> list[int]:
        """The sides of which no info has come."""
        with self._news:
            return [side for side, infos in enumerate(self._recent) if not infos]

    def of_pair(self, left: Image, right: Image) -> StereoCalibration | None:
        """Calibration for a pair, None if there is no camera_info yet.

        Raises:
            ValueError: the camera_infos cannot be used, and why.
        """
        infos = self._find(left, right)
        if infos is None:
            return None
        for info, image in zip(infos, (left, right), strict=True):
            if (info.width, info.height) not in ((0, 0), (image.width, image.height)):
                raise ValueError(
                    f"it is for {info.width}x{info.height}, the image has "
                    f"{image.width}x{image.height}"
                )
        key = tuple(_numbers(info) for info in infos)
        if self._last is None or self._last[0] != key:
            try:
                self._last = key, self._make(*infos)
            except ValueError as error:
                self._last = key, error
        if isinstance(self._last[1], ValueError):
            raise ValueError(str(self._last[1]))
        return self._last[1]

    def _make(self, left: CameraInfo, right: CameraInfo) -> StereoCalibration:
        if self.raw:
            return RawStereoCalibration.from_cameras(
                camera_from_info(left), camera_from_info(right)
            )
        return calibration_from_info(left, right)

    def _find(self, left: Image, right: Image) -> tuple[CameraInfo, CameraInfo] | None:
        """Infos with the stamps of a pair, waited for a little; else the newest; None if none."""

        def exact() -> list[CameraInfo] | None:
            found = [
                next((i for i in reversed(infos) if stamp_ns(i) == stamp_ns(image)), None)
                for infos, image in zip(self._recent, (left, right), strict=True)
            ]
            return None if None in found else found

        with self._news:
            if not all(self._recent):
                return None
            # Infos that once came without the stamp of a pair are not waited for every time.
            found = self._news.wait_for(exact, PATIENCE if self._stamped_alike else 0.0)
            self._stamped_alike = bool(found)
            return tuple(found or (infos[-1] for infos in self._recent))


def _numbers(info: CameraInfo) -> tuple:
    """All that a calibration is made of."""
    parts = (info.d, info.k, info.r, info.p)
    numbers = (np.asarray(part, np.float64).tobytes() for part in parts)
    return info.width, info.height, info.distortion_model, *numbers
