"""Stereo odometry: exact drift of made trajectories, exact motion of made points, a made drive."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import made_world
import numpy as np
import pytest
from made_world import DISPARITY, STEP_METRES
from scipy.spatial.transform import Rotation

from kp_frontend.calibration import StereoCalibration
from kp_frontend.cli import main
from kp_frontend.config import FrontendConfig
from kp_frontend.features import Features, StereoFeatures
from kp_frontend.network import build_network, save_network
from kp_training.evaluation.bags import writer
from kp_training.evaluation.odometry import estimation as odometry
from kp_training.evaluation.odometry.evaluation import evaluate_odometry

CALIBRATION = StereoCalibration(500.0, 500.0, 320.0, 240.0, 0.2)


def straight(count: int, step: float = 1.0, turn: float = 0.0) -> np.ndarray:
    """Poses (N, 4, 4) of a camera that goes ahead and yaws by `turn` degrees a step."""
    move = np.eye(4)
    move[:3, :3] = Rotation.from_euler("y", turn, degrees=True).as_matrix()
    move[2, 3] = step
    poses = [np.eye(4)]
    for _ in range(count - 1):
        poses.append(poses[-1] @ move)
    return np.stack(poses)


def test_drift_of_a_scale_error_is_that_error():
    truth, estimate = straight(101), straight(101, 1.02)
    errors = np.array(odometry.drift(estimate, truth, (10, 50)))
    assert len(errors) == 91 + 51  # from every frame that has so much way left
    np.testing.assert_allclose(errors[:, 1], 2.0, rtol=1e-6)
    np.testing.assert_allclose(errors[:, 2], 0.0, atol=1e-6)
    assert odometry.drift(truth, truth, (200,)) == []


def test_drift_of_a_turn_is_degrees_a_metre():
    errors = np.array(odometry.drift(straight(61, 1.0, 0.1), straight(61), (10, 20)))
    np.testing.assert_allclose(errors[:, 2], 0.1, rtol=1e-6)
    # The end of an arc of L metres that turns by a is about L * a / 2 beside the line's.
    near = errors[errors[:, 0] == 10, 1]
    np.testing.assert_allclose(near, 100 * np.deg2rad(1.0) / 2, rtol=0.15)


def test_absolute_error_heeds_shape_and_not_place():
    rng = np.random.default_rng(1)
    truth = straight(50, 1.0, 2.0)
    elsewhere = np.eye(4)
    elsewhere[:3, :3] = Rotation.from_rotvec([0.3, -0.8, 0.5]).as_matrix()
    elsewhere[:3, 3] = 5, -3, 8
    assert odometry.absolute_error(elsewhere @ truth, truth) == pytest.approx(0, abs=1e-9)
    noisy = truth.copy()
    noisy[:, :3, 3] += rng.normal(0, 0.1, (50, 3))
    found = odometry.absolute_error(elsewhere @ noisy, truth)
    assert found == pytest.approx(0.1 * np.sqrt(3), rel=0.25)
    # No scale is forgiven: a line of 49 m that is 10 % too long, aligned at its middle.
    line = straight(50)
    off = 0.1 * np.abs(np.arange(50) - 24.5)
    found = odometry.absolute_error(straight(50, 1.1), line)
    assert found == pytest.approx(np.sqrt((off**2).mean()))


def test_lengths_fit_the_way():
    assert odometry.sub_lengths(1000) == tuple(range(100, 900, 100))
    assert odometry.sub_lengths(60) == (10, 20, 30, 40, 50)
    assert odometry.sub_lengths(2.0) == pytest.approx((0.5, 1.0, 1.5))
    assert all(length < 0.05 for length in odometry.sub_lengths(0.05))


def made_view(points: np.ndarray, pose: np.ndarray) -> StereoFeatures:
    """Features of points (N, 3) in the world as a camera with a pose sees them exactly."""
    seen = (points - pose[:3, 3]) @ pose[:3, :3]
    c, count = CALIBRATION, len(points)
    xy = seen[:, :2] / seen[:, 2:] * (c.fx, c.fy) + (c.cx, c.cy)
    disparity = c.fx * c.baseline / seen[:, 2]
    own = np.eye(count, dtype=np.float32)
    ones, ids = np.ones(count, np.float32), np.zeros(count, np.uint32)
    left, right = (Features(p.astype(np.float32), ones, own, ids, ids.astype(np.uint16), ones)
                   for p in (xy, xy - np.column_stack([disparity, 0 * disparity])))  # fmt: skip
    index = np.arange(count, dtype=np.uint32)
    return StereoFeatures(
        640, 480, left, right, index, index, disparity.astype(np.float32), ones, ones, ones,
        c.points(xy, disparity), 0.0, c,
    )  # fmt: skip


@pytest.fixture
def views():
    rng = np.random.default_rng(0)
    points = rng.uniform((-2, -1.5, 4), (2, 1.5, 12), (80, 3))
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec([0.01, 0.03, -0.02]).as_matrix()
    pose[:3, 3] = 0.1, -0.05, 0.4
    return made_view(points, np.eye(4)), made_view(points, pose), pose


def test_motion_of_exact_points_is_exact(views):
    before, now, pose = views
    found, inliers = odometry.motion(before, now)
    assert inliers == 80
    np.testing.assert_allclose(found, pose, atol=1e-4)


def test_motion_bears_false_matches_but_not_only_false_ones(views):
    before, now, pose = views
    rows = np.arange(80)
    rows[:30] = np.roll(rows[:30], 1)
    some = replace(now, left=replace(now.left, descriptors=now.left.descriptors[rows]))
    found, inliers = odometry.motion(before, some)
    assert 50 <= inliers < 60
    np.testing.assert_allclose(found, pose, atol=1e-3)
    rows = np.random.default_rng(2).permutation(80)
    false = replace(now, left=replace(now.left, descriptors=now.left.descriptors[rows]))
    found, inliers = odometry.motion(before, false)
    assert found is None and inliers < odometry.FEWEST_INLIERS
    # Points without depth do not count.
    blind = replace(before, points=np.full((80, 3), np.nan, np.float32))
    assert odometry.motion(blind, now) == (None, 0)


def test_a_frame_that_fails_is_named_and_goes_on_as_before():
    frames = made_world.wall(5)
    blank = np.zeros_like(frames[0].left)
    frames[3] = replace(frames[3], left=blank, right=blank)
    method = odometry.stereo_method("sift", FrontendConfig(max_keypoints=400))
    track = odometry.track_camera(frames, method)
    assert track.failed == [3, 4] and len(track.poses) == 5
    steps = np.diff([pose[0, 3] for pose in track.poses])
    np.testing.assert_allclose(steps, STEP_METRES, rtol=0.05)
    with pytest.raises(ValueError, match="calibrated"):
        odometry.track_camera([replace(frames[0], cameras=None)], method)


@pytest.mark.parametrize("name", ["sift", "orb", "tiny"])
def test_every_method_goes_through_the_same_stereo_matching(name):
    frame = made_world.wall(1)[0]
    config = FrontendConfig(backend="torch", threads=1, max_keypoints=300)
    features = odometry.stereo_method(name, config)(frame.left, frame.right, frame.calibration())
    assert len(features) > 60
    assert np.median(np.abs(features.disparity - DISPARITY)) < 0.1
    assert np.median(features.points[:, 2]) == pytest.approx(made_world.DEPTH, rel=0.01)
    left = features.left.keypoints[features.left_index, 1]
    right = features.right.keypoints[features.right_index, 1]
    assert np.abs(left - right).max() <= config.row_tolerance


def drive(tmp_path: Path, scale: float = 1.0) -> Path:
    """A bag of the made wall whose true poses are stretched."""
    frames = made_world.wall(12)
    for frame in frames:
        frame.pose[:3, 3] *= scale
    path = tmp_path / "drive.mcap"
    writer.write_bag(made_world.sequence(frames), path)
    return path


def test_a_made_drive_is_followed_and_compared(tmp_path, capsys):
    out = tmp_path / "out"
    status = main(
        ["evaluate", "odometry", str(drive(tmp_path)), "--methods", "tiny,sift", "--out", str(out),
         "--backend", "torch", "--threads", "1", "--max-keypoints", "300"]
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    result = json.loads((out / "metrics.json").read_text())
    assert result["sequence"]["metres"] == pytest.approx(11 * STEP_METRES)
    # A flat wall hardly tells turning from sliding, so the bounds are wide.
    for metrics, most in zip(result["methods"].values(), (20, 4), strict=True):
        assert metrics["drift_percent"]["mean"] < most
        assert metrics["ate_m"]["mean"] < 0.03
        assert metrics["failed_frames"] == {"mean": 0, "std": 0, "count": 1, "frames": [],
                                            "per_scene": {"drive.mcap": 0}}  # fmt: skip
    report = (out / "report.html").read_text()
    assert "drift, %" in report and "data:image" in report


def test_false_truth_is_drift(tmp_path):
    config = FrontendConfig(max_keypoints=300)
    result = evaluate_odometry(drive(tmp_path, 1.25), ["sift"], config)
    assert result["methods"]["sift"]["drift_percent"]["mean"] == pytest.approx(20, abs=2)


def test_weights_of_one_file_name_stay_apart(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        save_network(build_network("tiny"), tmp_path / run / "best.safetensors")
    names = [str(tmp_path / run / "best.safetensors") for run in ("a", "b")]
    config = FrontendConfig(backend="torch", threads=1, max_keypoints=64)
    result = evaluate_odometry(drive(tmp_path), names, config)
    assert list(result["methods"]) == names
    assert set(result["trajectories"]) == {"truth", *names}


def test_wrong_input_ends_in_one_line(tmp_path, capsys):
    frames = [replace(frame, pose=None) for frame in made_world.wall(3)]
    writer.write_bag(made_world.sequence(frames), tmp_path / "poseless.mcap")
    for path, words in (
        (tmp_path / "poseless.mcap", "has no topic with true poses"),
        (tmp_path / "none", "does not exist"),
        (tmp_path, "has neither KITTI's layout"),
    ):
        assert main(["evaluate", "odometry", str(path), "--out", str(tmp_path / "out")]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and words in lines[0]
