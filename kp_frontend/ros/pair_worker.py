"""The worker: processes the newest pair and publishes its features in a separate thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rclpy.publisher import Publisher

from kp_frontend.calibration import StereoCalibration
from kp_frontend.features import StereoFeatures
from kp_frontend.frontend import BadInput
from kp_frontend.health import HealthMonitor
from kp_frontend.ros.camera_infos import CameraInfos
from kp_frontend.ros.diagnostics import Figures
from kp_frontend.ros.engine import EngineFailed, SupervisedEngine
from kp_frontend.ros.image_counters import ImageCounters
from kp_frontend.ros.messages import ImageMessage, stamp_ns, stereo_message
from kp_frontend.ros.newest_wins import NewestWins
from kp_frontend.ros.parameters import Parameters
from kp_frontend.ros.rclpy_private import RCLError
from kp_frontend.ros.visualisation import VisualisationPublishers


@dataclass(frozen=True)
class Pair:
    """The two messages of a stereo pair, and their images as arrays."""

    messages: tuple[ImageMessage, ImageMessage]
    greys: tuple[np.ndarray, np.ndarray]
    came: float  # monotonic seconds
    decoded: float
    epoch: int  # stream epoch; changes when time jumps


class PairWorker:
    """A thread that processes the newest pair. Each pair adds to exactly one counter.

    Args:
        parameters: read again for each pair.
        publisher: publishes the features.
        say, say_bad: called with each warning, and with each warning about invalid images.
    """

    def __init__(
        self,
        engine: SupervisedEngine,
        parameters: Parameters,
        infos: CameraInfos,
        counters: ImageCounters,
        figures: Figures,
        health: HealthMonitor,
        publisher: Publisher,
        visualisation: VisualisationPublishers,
        say: Callable[[str], None],
        say_bad: Callable[[str], None],
    ) -> None:
        self._engine, self._parameters, self._infos = engine, parameters, infos
        self._counters, self._figures, self._health = counters, figures, health
        self._publisher, self._visualisation = publisher, visualisation
        self._say, self._say_bad = say, say_bad
        self._epoch = 0
        self.calibration_problem = ""
        self._thread = NewestWins("worker", self._work, lambda _: counters.dropped("replaced"))
        self.put = self._thread.put

    def stop(self) -> None:
        """End the thread after its current pair."""
        if self._thread.stop() is not None:
            self._counters.dropped("stopped")

    def _work(self, pair: Pair) -> None:
        begin = time.monotonic()
        try:
            result = self._compute(pair, begin)
            if result is None:
                self._counters.dropped("uncalibrated")
                return
            computed = time.monotonic()
            left, right = (message.header for message in pair.messages)
            kind = self._parameters.node.descriptor_type
            self._publisher.publish(
                stereo_message(result, left, right, self._counters.pairs_processed, kind)
            )
        except BadInput as error:
            self._counters.dropped("bad")
            self._say_bad(f"pair dropped: {error}")
        except EngineFailed as error:
            self._counters.dropped("failed")
            self._say(f"pair dropped, {error}")
        except RCLError as error:  # the context was shut down while this pair was computed
            self._counters.dropped("stopped")
            self._say(f"not published: {error}")
        except Exception as error:  # an error with one pair must not end the thread
            self._counters.dropped("failed")
            self._say(f"pair dropped, {type(error).__name__}: {error}")
        else:
            self._counters.processed()
            published = time.monotonic()
            result.stage_ms["publish"] = 1e3 * (published - computed)
            self._figures.add(result, 1e3 * (published - pair.came))
            self._health.add(published, result, *pair.greys, self._infos.cameras())
            self._visualisation.offer(result, pair.greys[0], left)

    def _compute(self, pair: Pair, begin: float) -> StereoFeatures | None:
        """The features of a pair, or None for raw images without calibration."""
        frontend, settings = self._engine.frontend, self._parameters.frontend
        if settings is not frontend.config:
            frontend.configure(settings)
        if pair.epoch != self._epoch:
            frontend.reset()
            self._epoch = pair.epoch
        calibration = self._calibration(pair)
        if calibration is None and self._infos.raw:
            return None
        calibrated = time.monotonic()
        result = self._engine(*pair.greys, calibration)
        result.stage_ms["decode"] = 1e3 * (pair.decoded - pair.came)
        result.stage_ms["wait"] = 1e3 * (begin - pair.decoded)
        result.stage_ms["calibrate"] = 1e3 * (calibrated - begin)
        return result

    def _calibration(self, pair: Pair) -> StereoCalibration | None:
        try:
            left, right = pair.messages
            height, width = pair.greys[0].shape
            found = self._infos.of_pair((stamp_ns(left), stamp_ns(right)), (width, height))
            self.calibration_problem = ""
            return found
        except ValueError as error:
            self.calibration_problem = str(error)
            return None
