"""StereoOdometry in made worlds: exact, noisy, and with everything that goes wrong on a robot."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import made_views
import numpy as np
import pytest
from made_views import INTERVAL, corridor, off, pose, room, view, way

from kp_frontend.odometry import OdometryConfig, Status, StereoOdometry
from kp_frontend.odometry.observations import observe
from kp_frontend.odometry.smoother import spread

NOISE = {"noise": 0.35, "disparity_noise": 0.2}
CURVE = pose((0.005, 0, 0.2), (0, 0.002, 0))


def follow(odometry, points, poses, change=None, first=1, **noise):
    """Estimates for a way through a world; `change` may replace the features of a frame."""
    estimates = []
    for i, camera in enumerate(poses):
        features = view(points, camera, **noise)
        if change is not None:
            features = change(i, features)
        if features is not None:
            estimates.append(odometry(features, (first + i) * INTERVAL))
    return estimates


def only(rows):
    """Keeps the matches of some rows."""

    def change(features):
        return replace(
            features,
            left_index=features.left_index[rows],
            right_index=features.right_index[rows],
            disparity=features.disparity[rows],
            disparity_sigma=features.disparity_sigma[rows],
            points=features.points[rows],
        )

    return change


@pytest.fixture(scope="module")
def tunnel():
    return corridor()


@pytest.mark.parametrize("smoothing", [True, False])
@pytest.mark.parametrize("solver", ["poselib", "opencv"])
def test_exact_measurements_give_the_exact_way(tunnel, solver, smoothing):
    poses = way(CURVE, 25)
    odometry = StereoOdometry(OdometryConfig(solver=solver, smoothing=smoothing))
    estimates = follow(odometry, tunnel, poses)
    assert [e.status for e in estimates] == [Status.STARTED] + [Status.TRACKING] * 24
    for estimate, truth in zip(estimates, poses, strict=True):
        assert max(off(estimate.pose, truth)) < 1e-4
    shift = CURVE[:3, :3].T @ CURVE[:3, 3]  # along the axes that the camera has in the end
    speed = np.concatenate([shift, (0, 0.002, 0)]) / 0.1
    np.testing.assert_allclose(estimates[-1].velocity, speed, atol=1e-3)
    if smoothing:
        landmarks = estimates[-1].landmarks
        assert 100 <= len(landmarks) <= odometry.config.landmarks
        apart = np.linalg.norm(landmarks[:, None] - tunnel.places, axis=2).min(1)
        assert np.percentile(apart, 90) < 0.01  # in the world's frame, where the points are


def test_smoothing_is_nearer_than_frame_to_frame_and_knows_how_near(tunnel):
    poses = way(CURVE, 40)
    errors: dict[bool, list] = {True: [], False: []}
    distances = []
    for seed in range(2):
        for smoothing in errors:
            odometry = StereoOdometry(OdometryConfig(smoothing=smoothing))
            rng = np.random.default_rng(seed)
            estimates = follow(odometry, tunnel, poses, rng=rng, most=150, **NOISE)
            for first in range(30):
                step = np.linalg.inv(estimates[first].pose) @ estimates[first + 10].pose
                true_step = np.linalg.inv(poses[first]) @ poses[first + 10]
                errors[smoothing].append(off(step, true_step)[0])
            if smoothing:
                for i in (13, 26, 39):
                    miss = estimates[i].pose[:3, 3] - poses[i][:3, 3]
                    spread = estimates[i].covariance[:3, :3]
                    distances.append(miss @ np.linalg.solve(spread, miss))
    assert np.mean(errors[True]) < 0.8 * np.mean(errors[False])
    assert np.mean(errors[True]) < 0.01 * 10 * 0.2  # 1 % of the way
    assert 0.1 < np.mean(distances) / 3 < 4  # of a covariance that holds: 1


@pytest.mark.parametrize("solver", ["poselib", "opencv"])
def test_half_the_tracks_may_be_wrong(tunnel, solver):
    rng = np.random.default_rng(1)

    def swap(i, features):
        rows = rng.permutation(len(features.left))[: len(features.left) // 2]
        ids, descriptors = features.left.track_ids.copy(), features.left.descriptors.copy()
        other = np.roll(rows, 1)
        ids[rows], descriptors[rows] = ids[other], descriptors[other]
        return replace(
            features, left=replace(features.left, track_ids=ids, descriptors=descriptors)
        )

    poses = way(CURVE, 30)
    estimates = follow(StereoOdometry(OdometryConfig(solver=solver)), tunnel, poses, swap)
    assert all(e.status is Status.TRACKING for e in estimates[1:])
    assert estimates[-1].inliers < 0.6 * estimates[-1].matches
    assert off(estimates[-1].pose, poses[-1])[0] < 0.01 * 29 * 0.2


def test_a_standing_robot_stands(tunnel):
    rng = np.random.default_rng(2)
    estimates = follow(StereoOdometry(), tunnel, way(np.eye(4), 60), rng=rng, **NOISE)
    assert not any(e.keyframe for e in estimates)
    assert all(off(e.pose, np.eye(4))[0] < 0.02 for e in estimates)
    assert np.linalg.norm(estimates[-1].velocity) < 0.2


def test_pure_rotation_moves_nothing():
    poses = way(pose(turn=(0, 2 * np.pi / 60, 0)), 61)
    estimates = follow(StereoOdometry(), room(), poses, rng=np.random.default_rng(3), **NOISE)
    assert all(e.status is Status.TRACKING for e in estimates[1:])
    assert max(off(e.pose, p)[0] for e, p in zip(estimates, poses, strict=True)) < 0.05
    assert off(estimates[-1].pose, np.eye(4))[1] < np.deg2rad(1)


def test_too_few_points_are_predicted_and_found_again(tunnel):
    def blind(i, features):
        return only(slice(5))(features) if 20 <= i < 24 else features

    poses = way(CURVE, 40)
    odometry = StereoOdometry()
    estimates = follow(odometry, tunnel, poses, blind)
    dark = estimates[20:24]
    assert {e.status for e in dark} == {Status.PREDICTED}
    assert {e.reason for e in dark} == {"too few points"}
    assert odometry.counts["too few points"] == 4
    spreads = [np.trace(e.covariance[:3, :3]) for e in estimates[19:24]]
    assert (np.diff(spreads) > 0).all()
    for estimate, truth in zip(dark, poses[20:24], strict=True):
        miss = estimate.pose[:3, 3] - truth[:3, 3]
        assert miss @ np.linalg.solve(estimate.covariance[:3, :3], miss) < 16
    assert {e.status for e in estimates[24:]} == {Status.TRACKING}
    assert max(off(estimates[-1].pose, poses[-1])) < 1e-3
    assert np.trace(estimates[-1].covariance[:3, :3]) < spreads[-1] / 10


def test_a_view_of_something_else_goes_on_from_the_prediction(tunnel):
    # The camera comes out somewhere that it has never seen, and does not come back.
    elsewhere = corridor(seed=9)
    elsewhere = made_views.Points(elsewhere.places, first_id=100_000)
    poses = way(CURVE, 30)
    odometry = StereoOdometry()
    before = follow(odometry, tunnel, poses[:15])
    after = follow(odometry, elsewhere, poses[15:], first=16)
    assert after[0].status is Status.PREDICTED and after[0].reason == "too few matches"
    assert {e.status for e in after[1:]} == {Status.TRACKING}
    assert off(after[0].pose, poses[15])[0] < 0.05  # it went on as before
    # From then on the motion is told, but what was lost stays unknown.
    step = np.linalg.inv(after[0].pose) @ after[-1].pose
    assert max(off(step, np.linalg.inv(poses[15]) @ poses[-1])) < 1e-3
    spreads = [np.trace(e.covariance[:3, :3]) for e in (before[-1], after[-1])]
    assert spreads[1] > 10 * spreads[0]


def test_after_a_long_gap_in_another_place_smoothing_goes_on(tunnel):
    elsewhere = made_views.Points(corridor(seed=9).places, first_id=100_000)
    poses = way(CURVE, 20)
    odometry = StereoOdometry()
    follow(odometry, tunnel, poses[:10])
    after = follow(odometry, elsewhere, poses[10:], first=6000)  # ten minutes later
    assert after[0].status is Status.PREDICTED
    assert {(e.status, e.reason) for e in after[1:]} == {(Status.TRACKING, "")}
    assert not odometry.counts["smoother restarted"] and len(after[-1].landmarks) > 100
    step = np.linalg.inv(after[0].pose) @ after[-1].pose
    assert max(off(step, np.linalg.inv(poses[10]) @ poses[-1])) < 1e-3
    # The robot may be anywhere that it reaches in ten minutes, the angles are unknown.
    sigma = np.sqrt(np.diag(after[-1].covariance))
    assert (sigma[:3] > 500).all() and np.allclose(sigma[3:], np.pi / np.sqrt(3), rtol=0.01)


def test_a_restart_of_the_front_end_is_no_gap(tunnel):
    def restart(i, features):
        if i < 10:
            return features
        if i == 10:
            odometry.forget_tracks()
        # The same ids again, but for other points.
        ids = (features.left.track_ids + np.uint32(500)) % np.uint32(3000) + np.uint32(1)
        return replace(features, left=replace(features.left, track_ids=ids))

    poses = way(CURVE, 20)
    odometry = StereoOdometry()
    estimates = follow(odometry, tunnel, poses, restart)
    assert {e.status for e in estimates[1:]} == {Status.TRACKING}
    assert estimates[10].inliers > 0.9 * estimates[9].inliers
    assert max(off(estimates[-1].pose, poses[-1])) < 1e-4


def test_another_network_with_other_descriptors(tunnel):
    def change(i, features):
        if i < 10:
            return features
        return replace(
            features, left=replace(features.left, descriptors=features.left.descriptors[:, :32])
        )

    poses = way(CURVE, 20)
    estimates = follow(StereoOdometry(), tunnel, poses, change)
    assert {e.status for e in estimates[1:]} == {Status.TRACKING}
    assert max(off(estimates[-1].pose, poses[-1])) < 1e-4


@pytest.mark.parametrize("solver", ["poselib", "opencv"])
def test_a_car_over_half_the_image_is_not_the_world(tunnel, solver):
    car = made_views.Points(
        np.random.default_rng(4).uniform((-3.0, -1.3, 3.0), (-0.8, 1.3, 5.0), (600, 3)),
        first_id=100_000,
    )

    def with_car(i, features):
        if not 10 <= i < 30:
            return features
        passing = view(car, pose((0.07 * (i - 20), 0, 0)))
        return joined(passing, only_behind(features, passing))

    poses = way(CURVE, 40)
    estimates = follow(StereoOdometry(OdometryConfig(solver=solver)), tunnel, poses, with_car)
    share = [e.inliers / e.matches for e in estimates[12:28]]
    assert 0.2 < min(share) < 0.45  # most points were the car's
    assert max(off(e.pose, p)[0] for e, p in zip(estimates, poses, strict=True)) < 0.02


def only_behind(features, passing):
    """Without the points that the car hides."""
    low, high = passing.left.keypoints.min(0), passing.left.keypoints.max(0)
    hidden = ((features.left.keypoints > low) & (features.left.keypoints < high)).all(1)
    return only(np.flatnonzero(~hidden))(features)


def joined(a, b):
    """The matches of two views of one camera as those of one pair."""
    parts = []
    for features in (a, b):
        row = features.left_index
        parts.append(
            (
                features.left.keypoints[row], features.disparity,
                features.left.track_ids[row], features.left.descriptors[row],
            )
        )  # fmt: skip
    return made_views.features(*(np.concatenate(pair) for pair in zip(*parts, strict=True)))


@pytest.mark.parametrize("tracks_go_on", [True, False])
def test_dropped_frames(tunnel, tracks_go_on):
    def drop(i, features):
        if 10 <= i < 13:
            return None
        if i >= 13 and not tracks_go_on:  # the front end lost them: descriptors must do
            ids = features.left.track_ids + np.uint32(50_000)
            return replace(features, left=replace(features.left, track_ids=ids))
        return features

    poses = way(CURVE, 20)
    estimates = follow(StereoOdometry(), tunnel, poses, drop)
    assert {e.status for e in estimates[1:]} == {Status.TRACKING}
    assert max(off(estimates[-1].pose, poses[-1])) < 1e-4


def test_a_pair_without_calibration_is_predicted(tunnel):
    def blind(i, features):
        return replace(features, calibration=None) if i in (0, 10) else features

    poses = way(CURVE, 20)
    odometry = StereoOdometry()
    estimates = follow(odometry, tunnel, poses, blind)
    assert estimates[0].status is Status.REJECTED and estimates[1].status is Status.STARTED
    assert estimates[10].status is Status.PREDICTED
    assert {estimates[0].reason, estimates[10].reason} == {"no calibration"}
    assert odometry.counts["no calibration"] == 2
    truth = np.linalg.inv(poses[1]) @ poses[-1]
    assert max(off(estimates[-1].pose, truth)) < 1e-4


def test_another_calibration_starts_anew_where_it_is(tunnel):
    def zoom(i, features):
        other = replace(features.calibration, fx=401.0)
        return replace(features, calibration=other) if i >= 10 else features

    odometry = StereoOdometry()
    estimates = follow(odometry, tunnel, way(CURVE, 20), zoom)
    assert estimates[10].status is Status.STARTED
    assert estimates[10].reason == "calibration changed"
    assert off(estimates[10].pose, estimates[9].pose)[0] < 1e-6
    assert odometry.counts["calibration changed"] == 1


def test_time_that_stands_still_or_jumps(tunnel):
    poses = way(CURVE, 12)
    odometry = StereoOdometry()
    estimates = follow(odometry, tunnel, poses[:10])
    features = view(tunnel, poses[10])
    for stamp in (10 * INTERVAL, 9 * INTERVAL):
        again = odometry(features, stamp)
        assert again.status is Status.REJECTED and "not newer" in again.reason
        np.testing.assert_array_equal(again.pose, estimates[-1].pose)
    # A recording that starts again: far back.
    last = odometry(features, 100 * INTERVAL)
    back = odometry(view(tunnel, poses[11]), INTERVAL)
    assert back.status is Status.STARTED and back.reason == "time jumped back"
    np.testing.assert_array_equal(back.pose, last.pose)
    assert np.trace(back.covariance) > np.trace(last.covariance)
    assert odometry(view(tunnel, poses[10]), 2 * INTERVAL).status is Status.TRACKING
    assert odometry.counts["time stamp is not newer than the last one"] == 2


def test_a_long_gap_is_bridged_by_what_is_still_seen(tunnel):
    poses = way(CURVE, 12)
    odometry = StereoOdometry()
    follow(odometry, tunnel, poses[:10])
    estimate = odometry(view(tunnel, poses[11]), 200 * INTERVAL)
    assert estimate.status is Status.TRACKING and max(off(estimate.pose, poses[11])) < 1e-4


def test_broken_points_and_ids_are_counted(tunnel):
    def break_some(i, features):
        points, ids = features.points.copy(), features.left.track_ids.copy()
        points[:20] = np.nan, 1, 1
        points[20:30, 2] = -1
        points[30:40, 0] = np.inf
        ids[100:110] = ids[90]
        return replace(features, points=points, left=replace(features.left, track_ids=ids))

    poses = way(CURVE, 10)
    odometry = StereoOdometry()
    estimates = follow(odometry, tunnel, poses, break_some)
    assert odometry.counts["without depth"] == 400
    assert odometry.counts["repeated track id"] == 110
    assert max(off(estimates[-1].pose, poses[-1])) < 1e-4


def test_nothing_but_noise_is_no_motion(tunnel):
    rng = np.random.default_rng(5)

    def scatter(i, features):
        xy = rng.uniform((10, 10), (600, 460), features.left.keypoints.shape)
        args = (features.left.track_ids, features.left.descriptors)
        return made_views.features(xy, rng.uniform(2, 60, len(xy)), *args)

    estimates = follow(StereoOdometry(), tunnel, way(CURVE, 10), scatter)
    assert {e.status for e in estimates[1:]} == {Status.PREDICTED}
    assert {e.reason for e in estimates[1:]} == {"the matches agree on no motion"}


def test_what_is_kept_does_not_grow(tunnel):
    odometry = StereoOdometry(OdometryConfig(window=5))
    world, sizes = corridor(length=100.0, count=5000), []
    for i, camera in enumerate(way(pose((0, 0, 0.4)), 120)):
        odometry(view(world, camera, most=200), (i + 1) * INTERVAL)
        smoother = odometry._smoother
        if i in (30, 119):
            engine = smoother._smoother
            sizes.append(
                (engine.getFactors().size(), len(smoother._landmarks), len(smoother._seen))
            )
    for early, late in zip(*sizes, strict=True):
        assert late < 1.5 * early + 50


def test_landmarks_are_spread_over_image_and_depth(tunnel):
    observations, _ = observe(view(tunnel, np.eye(4)), made_views.CAMERA, OdometryConfig())
    rows = np.arange(len(observations))
    size = (made_views.WIDTH, made_views.HEIGHT)
    chosen = spread(observations, rows, np.ones(len(rows)), [], size)
    assert sorted(chosen) == rows.tolist()
    shares = []
    for picked in (chosen[:60], rows[:60]):
        columns = np.bincount((observations.pixels[picked, 0] // 160).astype(int), minlength=4)
        shares.append(columns.min() / 60)
    near = np.sort(observations.disparity)[-len(rows) // 5]
    assert shares[0] >= shares[1] and shares[0] > 0.15
    # Of what was seen longest in a cell comes first.
    ages = np.where(observations.disparity > near, 5, 2)
    first = spread(observations, rows, ages, [], size)[:40]
    assert ages[first].mean() > ages.mean()


@pytest.mark.parametrize(("name", "config"), [("poselib", "solver"), ("gtsam", "smoothing")])
def test_an_engine_that_is_missing_is_named(monkeypatch, name, config):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted: None if wanted == name else found(wanted)
    )
    with pytest.raises(ValueError, match=f"{config}.*pip install {name}"):
        StereoOdometry(OdometryConfig(solver="poselib"))
    without = StereoOdometry(OdometryConfig(smoothing=False))
    assert without.solver == ("opencv" if name == "poselib" else "poselib")
