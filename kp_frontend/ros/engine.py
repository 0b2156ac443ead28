"""Keeps the engine going: one that fails again and again is built anew, then replaced."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kp_frontend.calibration import StereoCalibration
from kp_frontend.features import StereoFeatures
from kp_frontend.frontend import BadInput, StereoFrontend

PATIENCE = 3  # failures in a row before something is done


class EngineFailed(RuntimeError):
    """A pair could not be computed, and it is not the pair's fault."""


class SupervisedEngine:
    """`StereoFrontend` under supervision. For one thread.

    After `PATIENCE` failures in a row the backend is built anew; after as many more the next best
    one is taken, and so on.

    Args:
        say: takes warnings in words.
    """

    def __init__(self, frontend: StereoFrontend, say: Callable[[str], None]) -> None:
        self.frontend, self._say = frontend, say
        self.failures_in_a_row = 0
        self.last_failure = ""
        self._rebuilt = False  # since the last success

    def __call__(
        self, left: np.ndarray, right: np.ndarray, calibration: StereoCalibration | None
    ) -> StereoFeatures:
        """As `StereoFrontend`.

        Raises:
            BadInput: these images cannot be processed.
            EngineFailed: anything else.
        """
        try:
            result = self.frontend(left, right, calibration)
        except BadInput:
            raise
        except Exception as error:  # whatever a library does, the next pair shall have its chance
            self.last_failure = f"{type(error).__name__}: {error}"
            self.failures_in_a_row += 1
            if self.failures_in_a_row % PATIENCE == 0:
                self._renew()
            raise EngineFailed(self.last_failure) from error
        self.failures_in_a_row, self._rebuilt = 0, False
        return result

    def _renew(self) -> None:
        failing = self.frontend.backend
        what = "the next best backend is taken" if self._rebuilt else "it is built anew"
        self._say(
            f"{failing} failed {self.failures_in_a_row} times in a row, {what}: {self.last_failure}"
        )
        self.frontend.drop_engine(next_best=self._rebuilt)
        self._rebuilt = True
