"""Supervises the engine: rebuilds it after repeated failures, then falls back to another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kp_frontend.calibration import StereoCalibration
from kp_frontend.features import StereoFeatures
from kp_frontend.frontend import BadInput, StereoFrontend

PATIENCE = 3  # failures in a row before the engine is rebuilt or replaced


class EngineFailed(RuntimeError):
    """The engine failed on a pair with valid images."""


class SupervisedEngine:
    """A supervised `StereoFrontend`. Call it from one thread only.

    After `PATIENCE` failures in a row it rebuilds the engine. After as many further failures it
    falls back to the next best backend, and so on.

    Args:
        say: called with each warning.
    """

    def __init__(self, frontend: StereoFrontend, say: Callable[[str], None]) -> None:
        self.frontend, self._say = frontend, say
        self.failures_in_a_row = 0
        self.last_failure = ""
        self._rebuilt = False  # since the last success

    def __call__(
        self, left: np.ndarray, right: np.ndarray, calibration: StereoCalibration | None
    ) -> StereoFeatures:
        """Call the `StereoFrontend`.

        Raises:
            BadInput: the images cannot be processed.
            EngineFailed: any other error.
        """
        try:
            result = self.frontend(left, right, calibration)
        except BadInput:
            raise
        except Exception as error:  # an error of any library must not stop the stream
            self.last_failure = f"{type(error).__name__}: {error}"
            self.failures_in_a_row += 1
            if self.failures_in_a_row % PATIENCE == 0:
                self._renew()
            raise EngineFailed(self.last_failure) from error
        self.failures_in_a_row, self._rebuilt = 0, False
        return result

    def _renew(self) -> None:
        failing = self.frontend.backend
        what = "falling back to the next best backend" if self._rebuilt else "rebuilding it"
        self._say(
            f"{failing} failed {self.failures_in_a_row} times in a row, {what}: {self.last_failure}"
        )
        self.frontend.drop_engine(next_best=self._rebuilt)
        self._rebuilt = True
