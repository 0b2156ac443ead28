"""Runs over a bag with different sources of features: their metrics, and their comparison."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from rich.progress import track

from kp_frontend.config import FrontendConfig
from kp_frontend.features import StereoFeatures
from kp_frontend.frontend import StereoFrontend
from kp_training.evaluation.bags.health import StreamHealth
from kp_training.evaluation.bags.stamps import stamp_text
from kp_training.evaluation.bags.stream import Row, StreamMetrics
from kp_training.evaluation.frames import StereoFrame

# Features of a frame and the milliseconds they took, or None if there are none.
Source = Callable[[StereoFrame], tuple[StereoFeatures, float | None] | None]
# A left image, its features, and its true disparity if there is one.
Example = tuple[np.ndarray, StereoFeatures, np.ndarray | None]
TEMPORAL = ("track_survival", "match_survival", "temporal_repeatability",
            "temporal_repeatability_1px", "track_flow_accuracy", "tracked", "track_accuracy",
            "track_accuracy_1px", "track_error_px")  # fmt: skip


@dataclass
class Run:
    """Results of one run.

    `rows` metrics by stamp, `previous` the stamp that a pair's temporal metrics refer to,
    `missing` stamps of pairs without features, `example` a pair from the middle to be shown.
    """

    rows: dict[int, Row] = field(default_factory=dict)
    previous: dict[int, int] = field(default_factory=dict)
    row_errors: np.ndarray = field(default_factory=lambda: np.zeros(0))
    missing: list[int] = field(default_factory=list)
    cameras: dict[int, str] = field(default_factory=dict)
    backend: str = ""
    example: Example | None = None
    tracks: dict[str, float | None] = field(default_factory=dict)  # of all pairs together
    survival: list[float | None] = field(default_factory=list)  # of tracks, by observations
    health: list[dict] = field(default_factory=list)  # as `StreamHealth.summary`

    def finish(self, metrics: StreamMetrics) -> None:
        """Store the values collected over the pairs."""
        self.previous = metrics.previous
        self.tracks, self.survival = metrics.tracks.values(), metrics.tracks.survival()
        self.row_errors = np.concatenate([np.zeros(0), *metrics.row_errors])


def measure(
    frames: Iterator[StereoFrame], source: Source, total: int, words: str, health: StreamHealth
) -> Run:
    """Metrics of all frames with the features of a source, and their health."""
    metrics, run = StreamMetrics(), Run()
    for number, frame in enumerate(track(frames, words, total=total)):
        run.cameras[frame.stamp] = frame.camera
        found = source(frame)
        if found is None:
            run.missing.append(frame.stamp)
            continue
        features, milliseconds = found
        health.add(frame, features)
        image = frame.rectified().left  # where the features' coordinates are
        row = metrics.add(frame.stamp, frame.camera, features, image, frame.disparity, frame.pose)
        run.rows[frame.stamp] = row | {"latency_ms": milliseconds}
        if number <= total // 2:
            run.example = (image, features, frame.disparity)
    run.finish(metrics)
    run.health = health.summary()
    return run


class Offline:
    """The front end called with each frame; time without building the engine for a new size."""

    def __init__(self, config: FrontendConfig, skipped: list[str]) -> None:
        self.frontend = StereoFrontend(config)
        self.first_size: tuple[int, int] | None = None
        self._size: tuple[int, int] | None = None
        self._skipped = skipped

    def __call__(self, frame: StereoFrame) -> tuple[StereoFeatures, float] | None:
        """Features of a frame; None, and named as skipped, if the front end refuses it."""
        try:
            calibration = frame.calibration()
        except ValueError as error:
            what = "not rectified" if frame.raw else "without depth"
            self._skipped.append(f"{stamp_text(frame.stamp)}: {what}: {error}")
            if frame.raw:
                return None
            calibration = None
        try:
            if frame.left.shape != self._size:
                self._size = height, width = frame.left.shape
                self.frontend.warm_up(height, width, frame.raw)
                self.first_size = self.first_size or self._size
            begin = time.perf_counter()
            features = self.frontend(frame.left, frame.right, calibration)
        except ValueError as error:
            self._skipped.append(f"{stamp_text(frame.stamp)}: {error}")
            return None
        return features, 1e3 * (time.perf_counter() - begin)


def agreement(one: Run, other: Run) -> dict:
    """Check that the metrics of two runs are identical for the pairs that both have.

    Temporal metrics count where both refer to the same pair before; latency is no such metric.
    """
    compared, differing = 0, []
    both = sorted(one.rows.keys() & other.rows.keys())
    for stamp in both:
        for name, value in one.rows[stamp].items():
            same_before = one.previous.get(stamp) == other.previous.get(stamp)
            if name == "latency_ms" or (name in TEMPORAL and not same_before):
                continue
            compared += 1
            found = other.rows[stamp].get(name)
            if value != found:
                differing.append([stamp_text(stamp), name, value, found])
    return {"pairs": len(both), "values": compared, "differing": differing}
