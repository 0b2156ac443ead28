"""The constant disparity error is learnt from motion, and from motion alone."""

from __future__ import annotations

from dataclasses import replace

import made_views
import numpy as np
import pytest
from made_views import CAMERA, INTERVAL, Points, off, pose, room, view, way

from kp_frontend.odometry import OdometryConfig, StereoOdometry
from kp_frontend.odometry.observations import observe
from kp_frontend.odometry.offset import _Pair

AHEAD = pose((0.01, 0, 1.0), (0, 0.003, 0))


@pytest.fixture(scope="module")
def street():
    """Points at the sides of a street and on its ground, 0 to 100 m ahead."""
    rng = np.random.default_rng(5)
    side = rng.choice([-8, 8], 8000) + rng.normal(0, 1, 8000)
    places = np.column_stack([side, rng.uniform(-6, 1.6, 8000), rng.uniform(0, 100, 8000)])
    places[::4, 0], places[::4, 1] = rng.uniform(-8, 8, 2000), 1.6
    return Points(places)


def shifted(features, error):
    """Features with an error of all disparities, in pixels."""
    disparity = features.disparity + np.float32(error)
    points = CAMERA.points(features.left.keypoints, disparity)
    return replace(features, disparity=disparity, points=points)


def drive(world, step, error, sigma=0.1, count=36):
    odometry, poses = StereoOdometry(OdometryConfig(calibration_sigma=sigma)), way(step, count)
    rng = np.random.default_rng(0)
    for i, camera in enumerate(poses):
        features = shifted(view(world, camera, 0.35, 0.2, most=250, rng=rng), error)
        estimate = odometry(features, (i + 1) * INTERVAL)
    return odometry, off(estimate.pose, poses[-1])[0]


def test_the_offset_is_learnt_while_driving(street):
    odometry, error = drive(street, AHEAD, 0.3)
    assert odometry.offset.value == pytest.approx(0.3, abs=0.05)
    assert odometry.offset.correction == odometry.offset.value
    assert 0.02 <= odometry.offset.sigma < 0.05
    _, without = drive(street, AHEAD, 0.3, sigma=0)
    assert error < without / 2
    odometry.reset()
    assert odometry.offset.value == pytest.approx(0.3, abs=0.05)  # it is the camera's


def test_an_exact_calibration_stays_as_it_is(street):
    odometry, error = drive(street, AHEAD, 0.0)
    assert abs(odometry.offset.value) < 0.04 and odometry.offset.correction == 0
    assert error == drive(street, AHEAD, 0.0, sigma=0)[1]


@pytest.mark.parametrize("step", [np.eye(4), pose(turn=(0, 0.05, 0))])
def test_without_motion_nothing_is_learnt(step):
    odometry, _ = drive(room(), step, 0.3, count=20)
    assert odometry.offset.value == pytest.approx(0, abs=0.01)
    assert odometry.offset.sigma > 0.09


def test_derivatives_are_those_of_the_residuals(street):
    views = [view(street, camera, 0.35, 0.2, rng=np.random.default_rng(1))
             for camera in (np.eye(4), AHEAD)]  # fmt: skip
    first, second = (observe(v, made_views.CAMERA, OdometryConfig())[0] for v in views)
    _, a, b = np.intersect1d(first.tracks, second.tracks, return_indices=True)
    pair = _Pair(first, a, second, b, CAMERA)
    x = np.array([0.01, -0.02, 0.03, 0.2, -0.1, -1.1, 0.15])
    numeric = np.column_stack(
        [(pair.residuals(x + h) - pair.residuals(x - h)) / 2e-6 for h in 1e-6 * np.eye(7)]
    )
    # At the best disparities the cost's gradient is exact; single residuals are nearly so.
    residuals, jacobian = pair.residuals(x), pair.jacobian(x)
    np.testing.assert_allclose(jacobian.T @ residuals, numeric.T @ residuals, rtol=1e-3)
