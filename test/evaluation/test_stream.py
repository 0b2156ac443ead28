"""Metrics of a stream of stereo features: known answers, and worse ones for worse features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_world import DISPARITY, HEIGHT, WIDTH, grid_features, texture

from kp_frontend.features import Features, StereoFeatures
from kp_training.evaluation.bags import stream
from kp_training.evaluation.bags.stream import StreamMetrics


def moved(features: StereoFeatures, side: str, by: tuple[float, float]) -> StereoFeatures:
    old = getattr(features, side)
    new = replace(old, keypoints=old.keypoints + np.float32(by))
    return replace(features, **{side: new})


def nothing() -> StereoFeatures:
    none = Features(
        np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros((0, 4), np.float32),
        np.zeros(0, np.uint32), np.zeros(0, np.uint16), np.zeros(0, np.float32),
    )  # fmt: skip
    index, values = np.zeros(0, np.uint32), np.zeros(0, np.float32)
    points = np.zeros((0, 3), np.float32)
    return StereoFeatures(WIDTH, HEIGHT, none, none, index, index, *[values] * 4, points, 0.0, None)


@pytest.mark.parametrize(
    ("rows", "accuracy", "error", "offset"), [(0.0, 1, 0, 0), (1.5, 1, 1.5, 1.5), (-3, 0, 3, -3)]
)
def test_epipolar_error_is_that_of_the_rows(rows, accuracy, error, offset):
    features = moved(grid_features(), "right", (0, rows))
    found = stream.epipolar_metrics(stream.unconstrained_rows(features))
    assert found["total_matches"] == len(features)
    assert found["matching_accuracy"] == accuracy
    assert found["epipolar_error_px"] == found["epipolar_error_p90_px"] == error
    assert found["row_offset_px"] == offset


def test_unconstrained_matches_are_by_descriptors_alone():
    features = grid_features()
    swapped = features.right.keypoints[::-1].copy()  # the matches given out do not change
    features = replace(features, right=replace(features.right, keypoints=swapped))
    found = stream.epipolar_metrics(stream.unconstrained_rows(features))
    assert found["matching_accuracy"] < 0.2


def test_a_plane_is_smooth_and_false_disparities_are_outliers():
    features = grid_features()
    found = stream.match_metrics(features)
    assert found == {"matched_share": 1, "disparity_roughness_px": 0, "disparity_outliers": 0}
    wrong = features.disparity.copy()
    wrong[::10] += 20
    found = stream.match_metrics(replace(features, disparity=wrong))
    assert found["disparity_outliers"] == pytest.approx(0.1, abs=0.01)
    # A pixel off is no outlier, but rough.
    rough = features.disparity + np.random.default_rng(0).choice([-1, 1], len(features))
    found = stream.match_metrics(replace(features, disparity=rough))
    assert found["disparity_outliers"] == 0 and found["disparity_roughness_px"] >= 1


def test_matched_share_and_coverage_fall_with_matches():
    features = grid_features()
    half = features.left_index[features.left.keypoints[:, 0] < WIDTH / 2]
    some = {
        name: getattr(features, name)[half]
        for name in ("left_index", "right_index", "disparity", "disparity_sigma", "similarity")
    }
    less = replace(features, **some)
    assert stream.match_metrics(less)["matched_share"] == len(half) / len(features)
    whole, part = stream.coverage_metrics(features), stream.coverage_metrics(less)
    assert whole["keypoint_coverage"] == part["keypoint_coverage"] == whole["match_coverage"]
    # One keypoint in each cell that the grid of features reaches: 13 of 16 columns, 11 of 12 rows.
    assert whole["match_coverage"] == pytest.approx(13 * 11 / (16 * 12))
    assert part["match_coverage"] == pytest.approx(len(half) / (16 * 12))


def test_survival_is_the_share_of_tracks_that_go_on():
    before, now = grid_features(), grid_features()
    assert stream.track_metrics(before, now) == {"track_survival": 1, "match_survival": 1}
    count = len(before.left)
    later = grid_features(first_track=1 + count // 2)
    kept = (count - count // 2) / count
    found = stream.track_metrics(before, later)
    assert found == {"track_survival": kept, "match_survival": kept}
    # All go on, but only a quarter of them has a match again.
    quarter = slice(0, count // 4)
    fewer = replace(now, left_index=now.left_index[quarter], right_index=now.right_index[quarter])
    found = stream.track_metrics(before, fewer)
    assert found == {"track_survival": 1, "match_survival": (count // 4) / count}
    strangers = grid_features(first_track=10_000)
    assert stream.track_metrics(before, strangers) == {"track_survival": 0, "match_survival": 0}


def test_repeatability_and_track_accuracy_ask_the_images_where_keypoints_went():
    image = texture(WIDTH + 40)
    before, now = (np.ascontiguousarray(image[:, x : x + WIDTH]) for x in (0, 6))
    features = grid_features()
    with_it = grid_features(shift=(-6, 0))
    assert stream.flow_metrics(features, with_it, before, now) == dict.fromkeys(
        stream.FLOW_METRICS, 1
    )
    off = stream.flow_metrics(features, grid_features(shift=(-6, 2)), before, now)
    assert off["temporal_repeatability"] == off["track_flow_accuracy"] == 1
    assert off["temporal_repeatability_1px"] == 0
    # The keypoints stay where they were although the image moved by half their distance.
    stuck = stream.flow_metrics(features, features, before, now)
    assert stuck["temporal_repeatability"] == stuck["track_flow_accuracy"] == 0
    # In the right places, but under the ids of other keypoints.
    ids = np.roll(with_it.left.track_ids, 1)
    swapped = replace(with_it, left=replace(with_it.left, track_ids=ids))
    found = stream.flow_metrics(features, swapped, before, now)
    assert found["temporal_repeatability"] == 1 and found["track_flow_accuracy"] == 0


def test_without_a_common_camera_nothing_is_said_of_time():
    image = texture(WIDTH)
    for camera, told in (("a", True), ("b", False)):
        metrics = StreamMetrics()
        metrics.add(1, "a", grid_features(), image)
        row = metrics.add(2, camera, grid_features(), image)
        assert ("track_survival" in row) == ("temporal_repeatability" in row) == told
        assert metrics.previous == ({2: 1} if told else {})


def test_ground_truth_tells_right_from_wrong():
    truth = np.full((HEIGHT, WIDTH), 10, np.float32)
    right = StreamMetrics().add(1, "", grid_features(10), None, truth)
    wrong = StreamMetrics().add(1, "", grid_features(16), None, truth)
    for name in ("stereo_accuracy", "disparity_accuracy", "repeatability"):
        assert right[name] == 1 and wrong[name] < 0.1, name
    assert "repeatability_unoccluded" not in right
    assert right["stereo_error_px"] == 0 and right["stereo_matches"] == wrong["stereo_matches"]


def test_a_pair_without_keypoints_is_no_good_one():
    metrics = StreamMetrics()
    blank = np.zeros((HEIGHT, WIDTH), np.uint8)
    row = metrics.add(1, "", nothing(), blank)
    assert row["keypoints"] == row["stereo_matches"] == row["total_matches"] == 0
    assert row["matching_accuracy"] == row["matched_share"] == row["keypoint_coverage"] == 0
    assert row["epipolar_error_px"] is None and row["disparity_outliers"] is None
    row = metrics.add(2, "", grid_features(DISPARITY), blank)
    assert row["temporal_repeatability"] is None and row["track_survival"] is None
    assert metrics.add(3, "", nothing(), blank)["track_survival"] == 0
