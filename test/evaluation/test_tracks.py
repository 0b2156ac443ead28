"""Metrics of tracks: exact on made features; KLT on a made wall."""

from __future__ import annotations

from dataclasses import replace

import made_world
import numpy as np
import pytest
from made_world import HEIGHT, STEP, STEP_METRES, WIDTH, grid_features

from kp_frontend.config import FrontendConfig
from kp_frontend.features import StereoFeatures
from kp_training.evaluation.odometry.frontends import stereo_method
from kp_training.evaluation.tracks import TrackMetrics, Trails, survival_figure


def with_tracks(ids: list[int]) -> StereoFeatures:
    """A few keypoints with these track ids."""
    features = grid_features()
    every = np.zeros(len(features.left), np.uint32)
    every[: len(ids)] = ids
    return replace(features, left=replace(features.left, track_ids=every))


def test_lengths_are_of_all_observations():
    metrics = TrackMetrics()
    for frame in range(12):
        metrics.add(with_tracks([1, 2 if frame < 3 else 100 + frame]))
    values = metrics.values()
    # Track 1 has 12 observations, track 2 has 3, nine others have 1.
    assert values["track_length"] == np.median([12] * 12 + [3] * 3 + [1] * 9)
    assert values["track_share_10"] == 12 / 24
    assert values["tracked"] == (11 + 2) / 11
    assert values["track_accuracy"] is None and values["track_error_px"] is None
    # Of 11 tracks; the last one could not reach two observations, the last two not three.
    assert metrics.survival()[:4] == [1.0, 2 / 10, 2 / 9, 1 / 8]
    assert set(TrackMetrics().values().values()) == {None}
    assert len(survival_figure({"a": metrics.survival()}).axes[0].lines) == 1


def slid(shift: float, first_track: int = 1) -> StereoFeatures:
    """Features on a wall, seen by a camera that slid so that they moved by `shift` pixels."""
    features = grid_features(made_world.DISPARITY, (shift, 0.0), first_track)
    calibration = made_world.wall(1)[0].calibration()
    points = calibration.points(features.left.keypoints, features.disparity)
    return replace(features, calibration=calibration, points=points)


def test_errors_are_distances_from_where_depth_and_motion_put_a_point():
    poses = [np.eye(4), np.eye(4)]
    poses[1][0, 3] = STEP_METRES
    for off, near, close in ((0.0, 1, 1), (2.0, 1, 0), (4.0, 0, 0)):
        metrics = TrackMetrics()
        metrics.add(slid(0.0), poses[0])
        row = metrics.add(slid(off - STEP), poses[1])
        assert row["track_error_px"] == pytest.approx(off, abs=1e-3)
        assert (row["track_accuracy"], row["track_accuracy_1px"]) == (near, close)
        assert row["tracked"] == len(slid(0.0).left)
    strangers = TrackMetrics()
    strangers.add(slid(0.0), poses[0])
    assert strangers.add(slid(-STEP, 5000), poses[1])["tracked"] == 0
    apart = TrackMetrics()
    apart.add(slid(0.0), poses[0])
    assert apart.add(slid(-STEP), poses[1], goes_on=False) == {}


def test_trails_lead_to_the_last_frame():
    trails, image = Trails(), np.zeros((HEIGHT, WIDTH), np.uint8)
    for shift in (0.0, 5.0, 10.0):
        trails.add(grid_features(shift=(shift, 0.0)), image)
    drawn = trails.draw()
    row = int(grid_features().left.keypoints[0, 1])
    coloured = drawn.any(-1)
    x = int(grid_features().left.keypoints[0, 0])
    assert coloured[row, x : x + 11].all() and not coloured[row, : x - 2].any()
    assert not Trails().draw().any()


def test_klt_follows_a_made_wall():
    method = stereo_method("klt", FrontendConfig(max_keypoints=150))
    metrics = TrackMetrics()
    for frame in made_world.wall(4):
        features = method(frame.left, frame.right, frame.calibration())
        assert 50 < len(features.left) <= 150
        assert np.median(np.abs(features.disparity - made_world.DISPARITY)) < 0.05
        metrics.add(features, frame.pose)
    values = metrics.values()
    assert values["track_accuracy_1px"] > 0.98 and values["track_error_px"] < 0.05
    assert values["track_length"] == 4
    assert (features.left.track_lengths == 4).mean() > 0.8
