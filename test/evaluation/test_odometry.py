"""`kp evaluate odometry`: exact scores of made trajectories, a made drive."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import made_world
import numpy as np
import pytest
from made_world import DISPARITY, STEP_METRES
from scipy.spatial.transform import Rotation

from kp_frontend.cli import main
from kp_frontend.config import FrontendConfig
from kp_frontend.network import build_network, save_network
from kp_frontend.odometry import OdometryEstimate, Status
from kp_training.evaluation.bags import writer
from kp_training.evaluation.odometry import trajectories
from kp_training.evaluation.odometry.evaluation import evaluate_odometry, follow
from kp_training.evaluation.odometry.frontends import stereo_method
from kp_training.evaluation.odometry.trajectories import Trajectory, score


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
    errors = np.array(trajectories.drift(estimate, truth, (10, 50)))
    assert len(errors) == 91 + 51  # from every frame that has so much way left
    np.testing.assert_allclose(errors[:, 1], 2.0, rtol=1e-6)
    np.testing.assert_allclose(errors[:, 2], 0.0, atol=1e-6)
    assert trajectories.drift(truth, truth, (200,)) == []


def test_drift_of_a_turn_is_degrees_a_metre():
    errors = np.array(trajectories.drift(straight(61, 1.0, 0.1), straight(61), (10, 20)))
    np.testing.assert_allclose(errors[:, 2], 0.1, rtol=1e-6)
    # The end of an arc of L metres that turns by a is about L * a / 2 beside the line's.
    near = errors[errors[:, 0] == 10, 1]
    np.testing.assert_allclose(near, 100 * np.deg2rad(1.0) / 2, rtol=0.15)


def trajectory(estimate, truth) -> Trajectory:
    """A trajectory with poses and true poses of which some may be None."""
    result = Trajectory()
    nothing = np.zeros(6), np.zeros((6, 6))
    for i, (pose, true_pose) in enumerate(zip(estimate, truth, strict=True)):
        status = Status.TRACKING if i else Status.STARTED
        result.add(i, true_pose, OdometryEstimate(i, pose, nothing[1], *nothing, status), 1.0)
    return result


def test_absolute_error_is_of_the_shape_and_not_of_the_place():
    rng = np.random.default_rng(1)
    truth = straight(50, 1.0, 2.0)
    elsewhere = np.eye(4)
    elsewhere[:3, :3] = Rotation.from_rotvec([0.3, -0.8, 0.5]).as_matrix()
    elsewhere[:3, 3] = 5, -3, 8
    assert score(trajectory(elsewhere @ truth, truth)).ate == pytest.approx(0, abs=1e-6)
    noisy = truth.copy()
    noisy[:, :3, 3] += rng.normal(0, 0.1, (50, 3))
    found = score(trajectory(elsewhere @ noisy, truth)).ate
    assert found == pytest.approx(0.1 * np.sqrt(3), rel=0.25)
    # No scale is forgiven.
    assert score(trajectory(straight(50, 1.1, 2.0), truth)).ate > 0.5


def test_a_way_that_tells_no_turn_is_compared_from_its_start():
    line = straight(50)
    off = 0.1 * np.arange(50)
    found = score(trajectory(straight(50, 1.1), line)).ate
    assert found == pytest.approx(np.sqrt((off**2).mean()))
    still = straight(5, 0.0)
    assert score(trajectory(still, still)).ate == 0


def test_the_worst_step_is_found_and_frames_without_truth_make_none():
    truth = straight(20, 1.0, 1.0)
    estimate = truth.copy()
    estimate[8:, :3, 3] += 0.3  # the step from 7 to 8 is off
    scores = score(trajectory(estimate, truth))
    assert len(scores.steps) == 19 and scores.steps.argmax() == 7
    assert scores.steps.max() == pytest.approx(0.3 * np.sqrt(3))
    assert np.delete(scores.steps, 7).max() < 1e-6
    some = [None if i in (0, 8, 12) else pose for i, pose in enumerate(truth)]
    scores = score(trajectory(estimate, some))
    assert len(scores.steps) == 14  # 17 known poses, and two gaps between them
    assert scores.steps.max() < 1e-6
    assert trajectory(estimate, some).known().tolist() == [
        i for i in range(20) if i not in (0, 8, 12)
    ]


def test_lengths_fit_the_way():
    assert trajectories.sub_lengths(1000) == tuple(range(100, 900, 100))
    assert trajectories.sub_lengths(60) == (10, 20, 30, 40, 50)
    assert trajectories.sub_lengths(2.0) == pytest.approx((0.5, 1.0, 1.5))
    assert all(length < 0.05 for length in trajectories.sub_lengths(0.05))


def test_a_frame_that_fails_is_named_and_bridged():
    frames = made_world.wall(6)
    blank = np.zeros_like(frames[0].left)
    frames[3] = replace(frames[3], left=blank, right=blank)
    method = stereo_method("sift", FrontendConfig(max_keypoints=400))
    followed = follow(frames, method)
    assert len(followed.matches) == 6 and followed.matches[3] == 0
    for track in followed.trajectories.values():
        assert track.failed == [3] and len(track.poses) == 6
        steps = np.diff([pose[0, 3] for pose in track.poses])
        np.testing.assert_allclose(steps, STEP_METRES, rtol=0.15)
    with pytest.raises(ValueError, match="calibrated"):
        follow([replace(frames[0], cameras=None)], method)


@pytest.mark.parametrize("name", ["sift", "orb", "tiny"])
def test_every_method_goes_through_the_same_stereo_matching(name):
    frame = made_world.wall(1)[0]
    config = FrontendConfig(backend="torch", threads=1, max_keypoints=300)
    features = stereo_method(name, config)(frame.left, frame.right, frame.calibration())
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
        assert abs(metrics["disparity_offset_px"]["mean"]) < 0.1
        assert metrics["failed_frames"] == {"mean": 0, "std": 0, "count": 1, "frames": [],
                                            "per_scene": {"drive.mcap": 0}}  # fmt: skip
    # The trajectories are files that evo's tools read, on the stamps of the frames.
    truth = np.loadtxt(out / "truth.tum")
    for name in ("tiny", "frame_tiny", "sift", "frame_sift"):
        rows = np.loadtxt(out / f"{name}.tum")
        assert rows.shape == (12, 8)
        np.testing.assert_array_equal(rows[:, 0], truth[:, 0])
    assert cv2.imread(str(out / "tracks_tiny.png")).shape == (
        made_world.HEIGHT,
        made_world.WIDTH,
        3,
    )
    report = (out / "report.html").read_text()
    assert "drift, %" in report and "within 1 px" in report and "data:image" in report


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
