"""`kp evaluate bag`: a stereo bag through the front end, or through the running node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.progress import track

from kp_frontend.frontend import FrontendConfig, StereoFeatures, StereoFrontend
from kp_frontend.ros.messages import stereo_features
from kp_training.evaluation.bag_messages import true_disparity
from kp_training.evaluation.bags import Bag, stamp_of
from kp_training.evaluation.frames import StereoFrame
from kp_training.evaluation.results import provenance, summary
from kp_training.evaluation.stereo_bag import (
    StereoBag,
    StereoTopics,
    choose_topics,
    stamp_text,
)
from kp_training.evaluation.stream import GRID, NEIGHBOURS, Row, StreamMetrics

# Features of a frame and the milliseconds they took, or None if there are none.
Source = Callable[[StereoFrame], tuple[StereoFeatures, float | None] | None]
HISTOGRAM_PX = 10.0  # of row errors; the last bin has all that is beyond
# A left image, its features, and its true disparity if there is one.
Example = tuple[np.ndarray, StereoFeatures, np.ndarray | None]
TEMPORAL = ("track_survival", "match_survival", "temporal_repeatability",
            "temporal_repeatability_1px", "track_accuracy")  # fmt: skip


@dataclass
class Run:
    """What one way of making the features gave.

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

    def finish(self, metrics: StreamMetrics) -> None:
        """Take what was collected over the pairs."""
        self.previous = metrics.previous
        self.row_errors = np.concatenate([np.zeros(0), *metrics.row_errors])


def measure(frames: Iterator[StereoFrame], source: Source, total: int, words: str) -> Run:
    """Metrics of all frames with the features of a source."""
    metrics, run = StreamMetrics(), Run()
    for number, frame in enumerate(track(frames, words, total=total)):
        run.cameras[frame.stamp] = frame.camera
        found = source(frame)
        if found is None:
            run.missing.append(frame.stamp)
            continue
        features, milliseconds = found
        row = metrics.add(frame.stamp, frame.camera, features, frame.left, frame.disparity)
        run.rows[frame.stamp] = row | {"latency_ms": milliseconds}
        if number <= total // 2:
            run.example = (frame.left, features, frame.disparity)
    run.finish(metrics)
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
            self._skipped.append(f"{stamp_text(frame.stamp)}: without depth: {error}")
            calibration = None
        try:
            if frame.left.shape != self._size:
                self.frontend.warm_up(*frame.left.shape)
                self._size = frame.left.shape
                self.first_size = self.first_size or self._size
            begin = time.perf_counter()
            features = self.frontend(frame.left, frame.right, calibration)
        except ValueError as error:
            self._skipped.append(f"{stamp_text(frame.stamp)}: {error}")
            return None
        return features, 1e3 * (time.perf_counter() - begin)


def evaluate_bag(
    path: Path,
    given: StereoTopics,
    config: FrontendConfig,
    out: Path,
    slop: float = 0.0,
    raw: bool = False,
    live: bool = False,
    rate: float = 1.0,
) -> tuple[dict, Example | None]:
    """Evaluate a bag; live, the same features are also computed here and compared.

    Args:
        given: topics that the user named.
        out: folder for the node's words.
        slop: seconds by which the stamps of a pair may differ.
        raw: the images are not rectified.
        rate: of playing live, times as fast as recorded.

    Returns:
        The contents of metrics.json, and a pair to be shown if there are images.

    Raises:
        ValueError: the bag cannot be read, or has not what is asked for.
    """
    if live and given.features is not None:
        raise ValueError("recorded features cannot be played: give either --features or --live")
    with Bag(path) as bag:
        topics = choose_topics(bag, given)
        if topics.left is None:
            if live:
                raise ValueError(f"{path} has features only: there are no images to play")
            return _recorded_alone(bag, topics), None
        camera = StereoBag(bag, topics, slop, raw)
        total = len(camera.stamps)
        if topics.features is not None and not live:
            recorded = recorded_features(bag, topics.features, camera.skipped)
            run = measure(
                camera.frames(),
                lambda frame: (recorded[frame.stamp], None) if frame.stamp in recorded else None,
                total,
                "recorded features",
            )
            runs = {"recorded": run}
            return _result(bag, topics, runs, *_images(camera, config, runs)), run.example
        source = Offline(config, camera.skipped)
        offline = measure(camera.frames(), source, total, "offline")
        if not offline.rows:
            raise ValueError(f"no pair of {path} could be used: {'; '.join(camera.skipped)}")
        offline.backend = source.frontend.backend
        runs = {Path(config.model).stem: offline}
        if not live:
            result = _result(bag, topics, runs, *_images(camera, config, runs))
            return result, offline.example
        from kp_training.evaluation.live import play  # only here: DDS

        said = list(camera.skipped)
        played = play(camera, config, source.first_size, out / "node.log", rate)
        run = measure(
            camera.frames(),
            lambda frame: (
                (played.features(frame.stamp), played.latency_ms[frame.stamp])
                if frame.stamp in played.messages
                else None
            ),
            total,
            "live",
        )
        camera.skipped[:] = said  # the second reading says the same again
        run.backend = played.counts.get("backend", "unknown")
        runs[f"{Path(config.model).stem} live"] = run
        result = _result(bag, topics, runs, *_images(camera, config, runs))
        result["live"] = {
            "rate": rate,
            "processed": len(run.rows),
            "of_other_pairs": [stamp_text(s) for s in sorted(played.messages.keys() - run.cameras)],
            "dropped": [stamp_text(stamp) for stamp in run.missing if stamp in offline.rows],
            "node": played.counts,
            "agreement": agreement(offline, run),
        }
        return result, run.example


def recorded_features(bag: Bag, topic: str, skipped: list[str]) -> dict[int, StereoFeatures]:
    """The features that a bag carries, by stamp; a message that cannot be used is named."""
    found = {}
    for _, _, raw in bag.messages([topic]):
        try:
            found[stamp_of(raw)] = stereo_features(bag.read(topic, raw))
        except ValueError as error:
            skipped.append(f"{stamp_text(stamp_of(raw))}: {error}")
    return found


def _recorded_alone(bag: Bag, topics: StereoTopics) -> dict:
    """Of a bag with features and no images: what needs none."""
    skipped: list[str] = []
    truths = {}
    for _, _, raw in bag.messages({topics.disparity} - {None}):
        truths[stamp_of(raw)] = true_disparity(bag.read(topics.disparity, raw))
    metrics, run = StreamMetrics(), Run()
    for stamp, features in recorded_features(bag, topics.features, skipped).items():
        truth = truths.get(stamp)
        if truth is not None and truth.shape != (features.height, features.width):
            skipped.append(f"{stamp_text(stamp)}: the disparity map has another size")
            truth = None
        run.cameras[stamp] = ""
        run.rows[stamp] = metrics.add(stamp, "", features, None, truth)
    if not run.rows:
        raise ValueError(f"{bag.path} has no usable features: {'; '.join(skipped) or 'no message'}")
    run.finish(metrics)
    return _result(bag, topics, {"recorded": run}, {"skipped": skipped}, {})


def agreement(one: Run, other: Run) -> dict:
    """Are the metrics of two runs the same to the last digit, in the pairs that both have?

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


def _summary(rows: dict[str, Row]) -> dict[str, dict]:
    """`summary` of all metrics that a pair has, with the number of pairs that have a value."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    metrics = summary(names, {pair: {n: row.get(n) for n in names} for pair, row in rows.items()})
    for metric in metrics.values():
        metric["count"] = sum(value is not None for value in metric["per_scene"].values())
    return metrics


def _images(camera: StereoBag, config: FrontendConfig, runs: dict[str, Run]) -> tuple[dict, dict]:
    """Where all images ended, and how they were treated."""
    pairs = {
        "images": camera.images,
        "paired": len(camera.stamps),
        "unpaired": {side: list(map(stamp_text, v)) for side, v in camera.unpaired.items()},
        "skipped": camera.skipped,
    }
    protocol = {
        "frontend": asdict(config),
        "backend": {method: run.backend for method, run in runs.items()},
        "rectified_here": camera.raw,
        "slop_s": camera.slop,
    }
    return pairs, protocol


def _result(
    bag: Bag, topics: StereoTopics, runs: dict[str, Run], pairs: dict, protocol: dict
) -> dict:
    """The contents of metrics.json."""
    cameras = next(iter(runs.values())).cameras
    rigs = len(set(cameras.values())) > 1  # then a pair is named by its camera, too

    def name(stamp: int) -> str:
        text = stamp_text(stamp)
        return f"{cameras[stamp]} {text}" if rigs else text

    histograms = {}
    for method, run in runs.items():
        counts, edges = np.histogram(run.row_errors.clip(0, HISTOGRAM_PX), 40, (0, HISTOGRAM_PX))
        histograms[method] = {"counts": counts.tolist(), "edges_px": edges.tolist()}
    return {
        "scenes": [name(stamp) for stamp in sorted(cameras)],
        "bag": {
            "path": str(bag.path),
            "seconds": bag.duration,
            "topics": {what: topic for what, topic in asdict(topics).items() if topic},
        },
        "pairs": {
            "processed": {method: len(run.rows) for method, run in runs.items()},
            "without_features": {m: [name(s) for s in run.missing] for m, run in runs.items()},
            **pairs,
        },
        "protocol": {"grid": list(GRID), "neighbours": NEIGHBOURS, **protocol, **provenance()},
        "methods": {
            method: _summary({name(stamp): row for stamp, row in run.rows.items()})
            for method, run in runs.items()
        },
        "histograms": histograms,
    }
