"""The constant disparity error is learnt from motion, and from motion alone."""

from __future__ import annotations

from dataclasses import replace

import made_views
import numpy as np
import pytest
from made_views import CAMERA, INTERVAL, Points, off, pose, room, view, way

from kp_frontend.odometry import OdometryConfig, StereoOdometry
from kp_frontend.odometry.motion import find_motion
from kp_frontend.odometry.observations import observe
from kp_frontend.odometry.offset import DisparityOffset, _Pair
from kp_frontend.odometry.state import OffsetPart, moved

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


def estimated(world, step, error, sigma=0.1, count=36):
    """The odometry, its last estimate and the true pose."""
    odometry, poses = StereoOdometry(OdometryConfig(calibration_sigma=sigma)), way(step, count)
    rng = np.random.default_rng(0)
    for i, camera in enumerate(poses):
        features = shifted(view(world, camera, 0.35, 0.2, most=250, rng=rng), error)
        estimate = odometry(features, (i + 1) * INTERVAL)
    return odometry, estimate, poses[-1]


def drive(*args, **options):
    """The odometry, and the error of its last position."""
    odometry, estimate, truth = estimated(*args, **options)
    return odometry, off(estimate.pose, truth)[0]


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


def test_the_derivative_of_a_motion_by_the_offset(street):
    first, second = view(street, np.eye(4)), view(street, AHEAD)
    _, a, b = np.intersect1d(first.left.track_ids, second.left.track_ids, return_indices=True)
    pixels, size = second.left.keypoints[b].astype(float), (made_views.WIDTH, made_views.HEIGHT)

    def motion(error):
        points = shifted(first, error).points[a].astype(float)
        return find_motion(points, pixels, CAMERA, size, OdometryConfig())

    assert np.linalg.norm(motion(0.0).by_offset[3:]) > 0.01  # metres a pixel
    change = np.linalg.inv(motion(-0.01).pose) @ motion(0.01).pose
    numeric = np.array([change[2, 1], change[0, 2], change[1, 0], *change[:3, 3]]) / 0.02
    # Adding to the disparities is subtracting an offset of the opposite sign.
    np.testing.assert_allclose(numeric, -motion(0.0).by_offset, rtol=0.05, atol=1e-4)


def test_the_covariances_contain_the_uncertainty_of_the_offset(street):
    """Without it, with an offset of 0.1 px, path and speed are many standard deviations off."""
    for sigma, holds in ((0.1, True), (0.0, False)):
        _, estimate, truth = estimated(street, AHEAD, 0.1, sigma)
        miss = estimate.pose[:3, 3] - truth[:3, 3]
        distance = miss @ np.linalg.solve(estimate.covariance[:3, :3], miss) / 3
        assert distance < 4 if holds else distance > 100
        _, early, _ = estimated(street, AHEAD, 0.1, sigma, count=5)
        miss = abs(early.velocity[2] - 10) / np.sqrt(early.velocity_covariance[2, 2])
        assert miss < 2 if holds else miss > 3


def test_errors_of_the_offset_add_up_and_stay():
    by_offset = np.array([0.0, 0.001, 0, 0, 0, 0.05])
    part = OffsetPart()
    for _ in range(10):
        part = part.moved(pose((0, 0, 1)), by_offset, 0.01)
    assert np.sqrt(part.covariance[5, 5]) == pytest.approx(10 * 0.05 * 0.1)
    np.testing.assert_allclose(part.covariance, 0.01 * np.outer(part.by_offset, part.by_offset))
    later = part.moved(AHEAD, variance=0.0001)  # a step without an error of its own
    np.testing.assert_allclose(later.covariance, moved(part.covariance, AHEAD), atol=1e-12)
    back = part  # the same way back: a constant error cancels
    for _ in range(10):
        back = back.moved(pose((0, 0, -1)), -by_offset, 0.01)
    assert back.covariance[5, 5] == pytest.approx(0, abs=1e-12)


def test_the_variance_of_the_correction_contains_an_offset_that_is_not_corrected():
    offset = DisparityOffset(0.1)
    offset._update(0.09, 0.03)
    assert offset.correction == 0  # not significant
    assert offset.variance == pytest.approx(offset.sigma**2 + offset.value**2)
    offset._update(0.09, 0.01)
    assert offset.correction == offset.value and offset.variance == offset.sigma**2
