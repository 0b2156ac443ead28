"""`kp evaluate bag`: a stereo bag through the front end, or through the running node."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from kp_frontend.config import FrontendConfig
from kp_frontend.features import StereoFeatures
from kp_frontend.ros.messages import stereo_features
from kp_training.evaluation.bags.health import StreamHealth
from kp_training.evaluation.bags.messages import true_disparity
from kp_training.evaluation.bags.reader import Bag, stamp_of
from kp_training.evaluation.bags.runs import Example, Offline, Run, agreement, measure
from kp_training.evaluation.bags.stamps import stamp_text
from kp_training.evaluation.bags.stereo import Reading, StereoBag
from kp_training.evaluation.bags.stream import GRID, NEIGHBOURS, Row, StreamMetrics
from kp_training.evaluation.bags.topics import StereoTopics, choose_topics
from kp_training.evaluation.frames import StereoFrame
from kp_training.evaluation.reasons import listed
from kp_training.evaluation.results import provenance, summary

HISTOGRAM_PX = 10.0  # of row errors; the last bin has all that is beyond


def evaluate_bag(
    path: Path,
    given: StereoTopics,
    config: FrontendConfig,
    out: Path,
    reading: Reading | None = None,
    live: bool = False,
    rate: float = 1.0,
) -> tuple[dict, Example | None]:
    """Evaluate a bag; live, the same features are also computed here and compared.

    Args:
        given: topics that the user named.
        out: folder for the node's words.
        reading: how the stereo camera is read.
        rate: of playing live, times as fast as recorded.

    Returns:
        The contents of metrics.json, and a pair to be shown if there are images.

    Raises:
        ValueError: the bag cannot be read, or has not what is asked for.
    """
    if live and given.features is not None:
        raise ValueError("recorded features cannot be played: give either --features or --live")
    reading = reading or Reading()
    if reading.receive_times and (live or given.features is not None):
        raise ValueError(
            "--use-receive-times cannot be used with --live or --features: the node and the "
            "recorded features know the stamps of the images only"
        )
    with Bag(path) as bag:
        topics = choose_topics(bag, given)
        if topics.left is None and topics.features is not None:
            if live:
                raise ValueError(f"{path} has features only: there are no images to play")
            return _recorded_alone(bag, topics, topics.features), None
        camera = StereoBag(bag, topics, reading)

        def health() -> StreamHealth:
            depths = config.min_depth, config.max_depth
            return StreamHealth([topics.left or "", topics.right or ""], camera.grey, depths)

        runs: dict[str, Run] = {}
        told: dict[str, dict] = {}
        if topics.features is not None and not live:
            runs["recorded"] = _recorded(camera, topics.features, health())
        else:
            name, source = Path(config.model).stem, Offline(config, camera.skipped)
            offline = runs[name] = _offline(camera, source, health())
            if live and (size := source.first_size):
                playing = (config, size, out, rate)
                runs[f"{name} live"], told = _live(camera, offline, *playing, health())
        result = _result(bag, topics, runs, *_images(camera, config, runs)) | told
        return result, list(runs.values())[-1].example


def _recorded(camera: StereoBag, topic: str, health: StreamHealth) -> Run:
    """With the features that the bag carries."""
    found = recorded_features(camera.bag, topic, camera.skipped)
    lonely = sorted(found.keys() - set(camera.stamps))
    camera.skipped += [f"{stamp_text(stamp)}: features without images" for stamp in lonely]

    def source(frame: StereoFrame) -> tuple[StereoFeatures, None] | None:
        return (found[frame.stamp], None) if frame.stamp in found else None

    return measure(camera.frames(), source, len(camera.stamps), "recorded features", health)


def _offline(camera: StereoBag, source: Offline, health: StreamHealth) -> Run:
    """With the front end called here."""
    run = measure(camera.frames(), source, len(camera.stamps), "offline", health)
    if not run.rows:
        raise ValueError(f"no pair of {camera.bag.path} is usable: {listed(camera.skipped)}")
    run.backend = source.frontend.backend
    return run


def _live(
    camera: StereoBag,
    offline: Run,
    config: FrontendConfig,
    size: tuple[int, int],
    out: Path,
    rate: float,
    health: StreamHealth,
) -> tuple[Run, dict]:
    """With what the node publishes, and how that compares."""
    from kp_training.evaluation.bags.live import play  # only here: DDS

    played = play(camera, config, size, out / "node.log", rate)

    def source(frame: StereoFrame) -> tuple[StereoFeatures, float] | None:
        features = played.features(frame.stamp)
        return None if features is None else (features, played.latency_ms[frame.stamp])

    said = list(camera.skipped)
    run = measure(camera.frames(), source, len(camera.stamps), "live", health)
    camera.skipped[:] = said  # the second reading repeats the messages
    run.backend = played.counts.get("backend", "unknown")
    return run, {
        "live": {
            "rate": rate,
            "processed": len(run.rows),
            "of_other_pairs": [stamp_text(s) for s in sorted(played.messages.keys() - run.cameras)],
            "dropped": [stamp_text(stamp) for stamp in run.missing if stamp in offline.rows],
            "node": played.counts,
            "agreement": agreement(offline, run),
        }
    }


def recorded_features(bag: Bag, topic: str, skipped: list[str]) -> dict[int, StereoFeatures]:
    """The features that a bag carries, by stamp; a message that cannot be used is named."""
    found = {}
    for _, time, raw in bag.messages([topic]):
        try:
            found[stamp_of(raw)] = stereo_features(bag.read(topic, raw))
        except (ValueError, AttributeError, TypeError) as error:  # fields of another version
            skipped.append(f"recorded at {stamp_text(time)}: {error}")
    return found


def _recorded_alone(bag: Bag, topics: StereoTopics, topic: str) -> dict:
    """Of a bag with features and no images: what needs none."""
    skipped: list[str] = []
    truths = {}
    for name, _, raw in bag.messages([topics.disparity] if topics.disparity else []):
        try:
            truths[stamp_of(raw)] = true_disparity(bag.read(name, raw))
        except ValueError as error:
            skipped.append(f"without ground truth: {error}")
    metrics, run = StreamMetrics(), Run()
    for stamp, features in recorded_features(bag, topic, skipped).items():
        truth = truths.get(stamp)
        if truth is not None and truth.shape != (features.height, features.width):
            skipped.append(f"{stamp_text(stamp)}: the disparity map has another size")
            truth = None
        run.cameras[stamp] = ""
        run.rows[stamp] = metrics.add(stamp, "", features, None, truth)
    if not run.rows:
        raise ValueError(f"{bag.path} has no usable features: {listed(skipped) or 'no message'}")
    run.finish(metrics)
    return _result(bag, topics, {"recorded": run}, {"skipped": skipped}, {})


def _summary(rows: dict[str, Row]) -> dict[str, dict]:
    """`summary` of all metrics that a pair has, with the number of pairs that have a value."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    metrics = summary(names, {pair: {n: row.get(n) for n in names} for pair, row in rows.items()})
    for metric in metrics.values():
        metric["count"] = sum(value is not None for value in metric["per_scene"].values())
    return metrics


def _of_all_pairs(run: Run) -> dict[str, dict]:
    """The metrics of tracks that no single pair has, in the form of the others."""
    found = {name: run.tracks[name] for name in ("track_length", "track_share_10")}
    return {
        name: {"mean": value, "std": 0.0, "count": len(run.rows), "per_scene": {}}
        for name, value in found.items()
        if value is not None
    }


def _images(camera: StereoBag, config: FrontendConfig, runs: dict[str, Run]) -> tuple[dict, dict]:
    """Counts of paired, processed and skipped images, and the reading options."""
    pairs = {
        "images": camera.images,
        "paired": len(camera.stamps),
        "unpaired": {side: list(map(stamp_text, v)) for side, v in camera.unpaired.items()},
        "skipped": camera.skipped,
    }
    protocol = {
        "frontend": asdict(config),
        "backend": {method: run.backend for method, run in runs.items()},
        "raw_images": camera.reading.raw,
        "slop_s": camera.reading.slop,
        "offset_s": camera.reading.offset,
        "receive_times": camera.reading.receive_times,
        "baseline_m": camera.reading.baseline,
        "pose_axes": camera.reading.pose_axes,
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
            "notes": bag.notes,
        },
        "pairs": {
            "processed": {method: len(run.rows) for method, run in runs.items()},
            "without_features": {m: [name(s) for s in run.missing] for m, run in runs.items()},
            **pairs,
        },
        "protocol": {"grid": list(GRID), "neighbours": NEIGHBOURS, **protocol, **provenance()},
        "methods": {
            method: _summary({name(stamp): row for stamp, row in run.rows.items()})
            | _of_all_pairs(run)
            for method, run in runs.items()
        },
        "track_survival": {method: run.survival for method, run in runs.items()},
        "health": {method: run.health for method, run in runs.items()},
        "histograms": histograms,
    }
