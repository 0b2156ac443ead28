"""Evaluates the odometry of several methods on a sequence with ground-truth poses."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.progress import track

from kp_frontend.config import FrontendConfig
from kp_frontend.odometry import OdometryConfig, StereoOdometry
from kp_training.evaluation.bags.files import is_bag
from kp_training.evaluation.bags.reader import Bag
from kp_training.evaluation.bags.stereo import Reading, StereoBag
from kp_training.evaluation.bags.topics import StereoTopics, choose_topics
from kp_training.evaluation.frames import StereoFrame
from kp_training.evaluation.odometry import trajectories
from kp_training.evaluation.odometry.frontends import StereoMethod, stereo_method
from kp_training.evaluation.odometry.trajectories import Trajectory
from kp_training.evaluation.results import provenance
from kp_training.evaluation.sequences import guess_layout, open_sequence
from kp_training.evaluation.tracks import TrackMetrics, Trails

# The two odometries that every method is followed by: the prefix of their metrics, and the config.
FRAME = "frame_"
ODOMETRIES = {
    "": OdometryConfig(),
    FRAME: OdometryConfig(smoothing=False, keyframe_parallax=0.0),
}


@contextmanager
def sequence_frames(
    path: Path, given: StereoTopics, reading: Reading
) -> Iterator[tuple[Iterator[StereoFrame], int, list[str]]]:
    """Rectified frames, how many there may be, and what was left out by the end of them.

    Raises:
        ValueError: neither a sequence nor a bag, or without poses.
    """
    if not is_bag(path):
        sequence = open_sequence(guess_layout(path), path)
        frames = (frame.rectified() for frame in sequence.frames)
        yield frames, sequence.length, sequence.left_out
        return
    with Bag(path) as bag:
        topics = choose_topics(bag, given)
        if topics.pose is None:
            raise ValueError(f"{path} has no topic with true poses; it has {bag.listing()}")
        if topics.left is None:
            raise ValueError(f"{path} has no images; it has {bag.listing()}")
        camera = StereoBag(bag, topics, reading)

        def all_frames() -> Iterator[StereoFrame]:
            yield from (frame.rectified() for frame in camera.frames())
            camera.skipped.extend(note for note in bag.notes if note not in camera.skipped)

        yield all_frames(), len(camera.stamps), camera.skipped


@dataclass
class Followed:
    """What following a camera with the features of one method gave.

    `trajectories` by the prefix of their metrics, `matches` in stereo of each frame, what is known
    of the tracks, and the way of those of the last frame.
    """

    trajectories: dict[str, Trajectory]
    matches: list[int] = field(default_factory=list)
    tracks: TrackMetrics = field(default_factory=TrackMetrics)
    trails: Trails = field(default_factory=Trails)


def follow(frames: Iterable[StereoFrame], method: StereoMethod) -> Followed:
    """Follow the camera through rectified frames with all of `ODOMETRIES`.

    Raises:
        ValueError: frames without a calibration.
    """
    odometries = {prefix: StereoOdometry(config) for prefix, config in ODOMETRIES.items()}
    followed = Followed({prefix: Trajectory() for prefix in odometries})
    for frame in frames:
        calibration = frame.calibration()
        if calibration is None:
            raise ValueError("odometry needs calibrated cameras: there is no camera_info")
        features = method(frame.left, frame.right, calibration)
        followed.matches.append(len(features))
        followed.tracks.add(features, frame.pose)
        followed.trails.add(features, frame.left)
        for prefix, odometry in odometries.items():
            begin = time.perf_counter()
            estimate = odometry(features, frame.stamp)
            ms = 1e3 * (time.perf_counter() - begin)
            followed.trajectories[prefix].add(frame.stamp, frame.pose, estimate, ms)
    return followed


def evaluate_odometry(
    path: Path,
    methods: list[str],
    config: FrontendConfig,
    given: StereoTopics | None = None,
    reading: Reading | None = None,
    out: Path | None = None,
) -> dict:
    """Follow the camera with every method and compare with the true poses.

    Frames without a true pose are followed too, and left out of the score.

    Args:
        path: a folder in KITTI's or EuRoC's layout, or a bag with poses.
        methods: `klt`, `sift`, `orb`, released networks, weights files.
        config: of the networks; the classics take its number of keypoints and stereo limits.
        reading: how the stereo camera of a bag is read.
        out: folder for the trajectories as TUM files and pictures of the tracks.

    Returns:
        The contents of metrics.json.

    Raises:
        ValueError: no such sequence or method, or one without poses.
    """
    results: dict[str, dict] = {}
    places: dict[str, list] = {}
    survival: dict[str, list] = {}
    truth = np.zeros((0, 4, 4))
    for name in methods:
        method = stereo_method(name, config)
        opened = sequence_frames(path, given or StereoTopics(), reading or Reading())
        with opened as (frames, total, left_out):
            followed = follow(track(frames, name, total=total), method)
        if unknown := _without_pose(path, followed):
            left_out.append(f"{unknown} frames without a true pose: followed, but not scored")
        results[name] = _metrics(followed, path.name)
        survival[name] = followed.tracks.survival()
        estimate, truth = followed.trajectories[""].compared()
        places[name] = estimate[:, :3, 3].tolist()
        if out is not None:
            _write_files(out, name, followed)
    way = float(trajectories.travelled(truth)[-1])
    return {
        "scenes": [path.name],
        "sequence": {
            "path": str(path),
            "frames": len(truth),
            "metres": way,
            "left_out": left_out,
        },
        "protocol": {
            "max_keypoints": config.max_keypoints,
            "lengths_m": list(trajectories.sub_lengths(way)),
            "solver": StereoOdometry(ODOMETRIES[FRAME]).solver,
            **{name: value for name, value in vars(ODOMETRIES[""]).items() if name != "solver"},
            **provenance(),
        },
        "methods": results,
        "trajectories": {"truth": truth[:, :3, 3].tolist(), **places},
        "track_survival": survival,
    }


def _without_pose(path: Path, followed: Followed) -> int:
    """The number of frames without a true pose.

    Raises:
        ValueError: fewer than two frames have one.
    """
    known = len(followed.trajectories[""].known())
    if known < 2:
        raise ValueError(f"{path} has {known} frames with a true pose: odometry needs two")
    return len(followed.matches) - known


def _write_files(out: Path, name: str, followed: Followed) -> None:
    """The truth and both trajectories of a method, which may be a path, as TUM files, and its
    tracks in the last frame as PNG."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    cv2.imwrite(str(out / f"tracks_{plain}.png"), followed.trails.draw())
    for prefix, trajectory in followed.trajectories.items():
        file = out / f"{prefix}{plain}.tum"
        trajectories.write_tum(file, trajectory.stamps, trajectory.poses)
    truth = followed.trajectories[""]
    known = truth.known()
    stamps = [truth.stamps[i] for i in known]
    _, poses = truth.compared()
    trajectories.write_tum(out / "truth.tum", stamps, poses)


def _metrics(followed: Followed, scene: str) -> dict:
    """Metrics of one method."""
    result: dict[str, dict] = {}
    for prefix, trajectory in followed.trajectories.items():
        found = _trajectory_metrics(trajectory, scene)
        result |= {prefix + name: values for name, values in found.items()}
    result["stereo_matches"] = _summary(np.array(followed.matches, float), scene)
    for name, value in followed.tracks.values().items():
        known = [] if value is None else [value]
        result[name] = _summary(np.array(known, float), scene)
    return result


def _trajectory_metrics(trajectory: Trajectory, scene: str) -> dict:
    """Metrics of one trajectory."""
    scores = trajectories.score(trajectory)
    drift = np.array(scores.drift).reshape(-1, 3)
    values = {
        "drift_percent": drift[:, 1],
        "rotation_deg_per_m": drift[:, 2],
        "ate_m": np.array([scores.ate]),
        "worst_step_m": np.sort(scores.steps)[-1:],
        "step_m": scores.steps,
        "failed_frames": np.array([float(len(trajectory.failed))]),
        "inliers": np.array(trajectory.inliers, float),
        "odometry_ms": np.array(trajectory.ms),
        "disparity_offset_px": np.array([trajectory.disparity_offset]),
    }
    result = {name: _summary(found, scene) for name, found in values.items()}
    lengths = sorted(set(drift[:, 0]))
    for column, name in ((1, "drift_percent"), (2, "rotation_deg_per_m")):
        result[name]["per_length"] = {
            f"{length:g}": float(drift[drift[:, 0] == length, column].mean()) for length in lengths
        }
    result["failed_frames"]["frames"] = trajectory.failed
    result["odometry_ms"]["median"] = float(np.median(trajectory.ms))
    return result


def _summary(values: np.ndarray, scene: str) -> dict[str, Any]:
    """The values of a metric in the format of metrics.json."""
    mean = float(values.mean()) if values.size else None
    return {
        "mean": mean,
        "std": float(values.std()) if values.size else None,
        "count": len(values),
        "per_scene": {scene: mean},
    }
