"""Odometry of several methods on a sequence with true poses, as metrics.json has it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from kp_frontend.config import FrontendConfig
from kp_training.evaluation.bags.files import is_bag
from kp_training.evaluation.bags.reader import Bag
from kp_training.evaluation.bags.stamps import stamp_text
from kp_training.evaluation.bags.stereo import Reading, StereoBag
from kp_training.evaluation.bags.topics import StereoTopics, choose_topics
from kp_training.evaluation.frames import StereoFrame
from kp_training.evaluation.odometry import estimation
from kp_training.evaluation.results import provenance
from kp_training.evaluation.sequences import guess_layout, open_sequence


@contextmanager
def posed_frames(
    path: Path, given: StereoTopics, reading: Reading
) -> Iterator[tuple[Iterator[StereoFrame], int, list[str]]]:
    """Rectified frames that have a pose, how many there may be, and what was left out by then.

    Raises:
        ValueError: neither a sequence nor a bag, or without poses.
    """

    def with_pose(
        frames: Iterator[StereoFrame], left_out: list[str], notes: Sequence[str] = ()
    ) -> Iterator[StereoFrame]:
        for frame in frames:
            if frame.pose is None:
                left_out.append(f"{stamp_text(frame.stamp)}: no true pose")
            else:
                yield frame
        left_out += [note for note in notes if note not in left_out]

    if not is_bag(path):
        sequence = open_sequence(guess_layout(path), path)
        frames = (frame.rectified() for frame in sequence.frames)
        yield with_pose(frames, sequence.left_out), sequence.length, sequence.left_out
        return
    with Bag(path) as bag:
        topics = choose_topics(bag, given)
        if topics.pose is None:
            raise ValueError(f"{path} has no topic with true poses; it has {bag.listing()}")
        if topics.left is None:
            raise ValueError(f"{path} has no images; it has {bag.listing()}")
        camera = StereoBag(bag, topics, reading)
        frames = (frame.rectified() for frame in camera.frames())
        yield with_pose(frames, camera.skipped, bag.notes), len(camera.stamps), camera.skipped


def evaluate_odometry(
    path: Path,
    methods: list[str],
    config: FrontendConfig,
    given: StereoTopics | None = None,
    reading: Reading | None = None,
) -> dict:
    """Follow the camera with every method and compare with the true poses.

    Args:
        path: a folder in KITTI's or EuRoC's layout, or a bag with poses.
        methods: `sift`, `orb`, released networks, weights files.
        config: of the networks; the classics take its number of keypoints and stereo limits.
        reading: how the stereo camera of a bag is read.

    Returns:
        The contents of metrics.json.

    Raises:
        ValueError: no such sequence or method, or one without poses.
    """
    results, trajectories = {}, {}
    truth: np.ndarray = np.zeros((0, 4, 4))
    for name in methods:
        method = estimation.stereo_method(name, config)
        posed = posed_frames(path, given or StereoTopics(), reading or Reading())
        with posed as (frames, total, left_out):
            poses: list[np.ndarray] = []
            noted = _noting(track(frames, name, total=total), poses)
            followed = estimation.track_camera(noted, method)
        if len(poses) < 2:
            raise ValueError(f"{path} has {len(poses)} frames with a true pose: odometry needs two")
        truth = np.linalg.inv(poses[0]) @ np.stack(poses)
        results[name] = _metrics(followed, truth, path.name)
        trajectories[name] = np.stack(followed.poses)[:, :3, 3].tolist()
    way = float(estimation.travelled(truth)[-1])
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
            "lengths_m": list(estimation.sub_lengths(way)),
            "similarity": estimation.SIMILARITY,
            "motion_share": estimation.MOTION_SHARE,
            "reprojection_px": estimation.REPROJECTION_PX,
            "ransac_rounds": estimation.RANSAC_ROUNDS,
            **provenance(),
        },
        "methods": results,
        "trajectories": {"truth": truth[:, :3, 3].tolist(), **trajectories},
    }


def _noting(frames: Iterable[StereoFrame], poses: list[np.ndarray]) -> Iterator[StereoFrame]:
    """The frames; their poses are collected as they pass."""
    for frame in frames:
        if frame.pose is not None:
            poses.append(frame.pose)
        yield frame


def _metrics(followed: estimation.Track, truth: np.ndarray, scene: str) -> dict:
    """Metrics of one trajectory."""
    estimate = np.stack(followed.poses)
    lengths = estimation.sub_lengths(float(estimation.travelled(truth)[-1]))
    errors = np.array(estimation.drift(estimate, truth, lengths)).reshape(-1, 3)
    values = {
        "drift_percent": errors[:, 1],
        "rotation_deg_per_m": errors[:, 2],
        "ate_m": np.array([estimation.absolute_error(estimate, truth)]),
        "failed_frames": np.array([float(len(followed.failed))]),
        "inliers": np.array(followed.inliers, float),
        "stereo_matches": np.array(followed.matches, float),
    }
    result: dict[str, dict[str, Any]] = {}
    for name, found in values.items():
        mean = float(found.mean()) if found.size else None
        result[name] = {
            "mean": mean,
            "std": float(found.std()) if found.size else None,
            "count": len(found),
            "per_scene": {scene: mean},
        }
    for column, name in ((1, "drift_percent"), (2, "rotation_deg_per_m")):
        result[name]["per_length"] = {
            str(length): float(errors[errors[:, 0] == length, column].mean())
            for length in lengths
            if (errors[:, 0] == length).any()
        }
    result["failed_frames"]["frames"] = followed.failed
    return result
